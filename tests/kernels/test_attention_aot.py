"""Attention in programs compiled for a TPU and an H100 that are not there.

JAX_PLATFORMS=cpu python -m pytest -n 0 -s tests/kernels/test_attention_aot.py
"""

import importlib.util
import os
import re
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from aot import compiled, on
from jax.experimental import topologies

import lora_jax as lora
from lora_jax import training
from lora_jax.kernels.attention import attend
from lora_jax.models import llama
from lora_jax.models.llama import LlamaConfig

T = 4096
TARGET = (Path(__file__).parent / "h100_sxm_target.textproto").read_text()
NARROW = LlamaConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_layers=4, num_heads=8,
    num_kv_heads=2, head_dim=32, context_length=T,
)  # fmt: skip
pytestmark = [pytest.mark.usefixtures("real_compilation"), pytest.mark.mixed_dtypes]
for_tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu: see requirements-aot.txt"
)
for_gpu = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="no CUDA plugin: see requirements-aot.txt",
)


@cache
def tpus(name: str, shape: tuple[int, int] = (1, 1)) -> jax.sharding.Mesh:
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:2x2")
    devices = topology.devices[: shape[0] * shape[1]]
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh(shape, ("fsdp", "tensor"), devices=devices, axis_types=auto)


@cache
def h100() -> jax.sharding.Mesh:
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=TARGET
    )
    return jax.sharding.Mesh(topology.devices, ("device",))


def shapes(dtype=jnp.bfloat16, B=1, N=32, K=8, H=128):
    q, k = (jax.ShapeDtypeStruct((B, T, heads, H), dtype) for heads in (N, K))
    return q, k, k, jax.ShapeDtypeStruct((B, T), jnp.int32)


def value_and_gradients(q, k, v, segment_ids, *, implementation=None):
    f = partial(attend, implementation=implementation)
    y, vjp = jax.vjp(lambda *a: f(*a, segment_ids), q, k, v)
    return y, *vjp(y)


def kernels_in(program) -> int:
    return program.as_text().count('custom_call_target="tpu_custom_call"')


def pairs_of_positions(program) -> set[str]:
    """The shapes of whatever holds a number for each pair of positions."""
    found = re.findall(r"\w+\[([\d,]+)\]", program.as_text())
    return {shape for shape in found if shape.split(",").count(str(T)) > 1}


@for_tpu
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_a_tpu_takes_the_kernel_and_stores_no_scores(implementation):
    f = partial(value_and_gradients, implementation=implementation)
    program = compiled(tpus("v5e"), "tpu", f, *shapes(H=64))
    assert kernels_in(program) == (3 if implementation is None else 0)
    assert bool(pairs_of_positions(program)) == (implementation == "xla")


@for_tpu
@pytest.mark.parametrize("dtype, H", [(jnp.bfloat16, 128), (jnp.float32, 80)])
def test_head_sizes_and_dtypes_compile(dtype, H):
    q, k, v, ids = shapes(dtype, H=H, N=8, K=2)
    f = partial(value_and_gradients, implementation="splash")
    assert kernels_in(compiled(tpus("v6e"), "tpu", f, q, k, v, ids)) == 3


@for_tpu
def test_each_chip_of_a_mesh_runs_it_on_its_rows_and_heads():
    mesh = tpus("v5e", (2, 2))
    specs = jax.P("fsdp", None, "tensor"), *[jax.P("fsdp", None, "tensor")] * 2, jax.P("fsdp")
    arguments = [on(mesh, s, a) for s, a in zip(specs, shapes(B=2, N=8, K=2), strict=True)]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(value_and_gradients).trace(*arguments)
        program = traced.lower(lowering_platforms=("tpu",)).compile()
    assert kernels_in(program) == 3 and "bf16[1,4,4096,128]" in program.as_text()
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", program.as_text())


def narrow_step(remat):
    """A training step at 4096 positions on one v5e."""
    tx = training.adamw(steps=10)

    def make():
        params = llama.init(NARROW, key=jax.random.key(0), dtype=jnp.bfloat16)
        base, delta = lora.lora_transform(params, lora.LoRA(rank=4), key=jax.random.key(0))
        return training.init_state(delta, tx, learning_rate=1e-4, seed=0), base

    names = {"tokens", "targets", "segment_ids", "positions"}
    batch = dict.fromkeys(names, jax.ShapeDtypeStruct((1, T), jnp.int32))
    batch["loss_mask"] = jax.ShapeDtypeStruct((1, T), bool)
    step = training.train_step(training.next_token_loss(NARROW, remat=remat), tx)
    mesh = tpus("v5e")
    placed = jax.tree.map(partial(on, mesh, jax.P()), (*jax.eval_shape(make), batch))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(step, donate_argnums=0).trace(*placed)
        return traced.lower(lowering_platforms=("tpu",)).compile()


@for_tpu
@pytest.mark.parametrize(
    ("remat", "kernels", "on_host"),
    [pytest.param("elementwise", 3, 0, marks=pytest.mark.slow),  # the forward kernel runs once
     ("offload", 4, NARROW.num_layers * T * NARROW.hidden_size * 2)],
)  # fmt: skip
def test_a_step_on_a_tpu(remat, kernels, on_host):
    program = narrow_step(remat)
    assert kernels_in(program) == kernels and not pairs_of_positions(program)
    assert program.memory_analysis().host_temp_size_in_bytes == on_host


@for_gpu
@pytest.mark.parametrize("packed", [True, False])
def test_a_gpu_takes_cudnn_and_stores_at_most_the_segments_bias(packed):
    q, k, v, ids = shapes(N=8, K=2)
    f = value_and_gradients if packed else partial(value_and_gradients, segment_ids=None)
    arguments = (q, k, v, ids) if packed else (q, k, v)
    program = compiled(h100(), "cuda", f, *arguments)
    assert "__cudnn$fmha" in program.as_text()
    # A single one of 2 bytes for each pair, whatever the number of heads.
    assert {tuple(s.strip("1,").split(",")) for s in pairs_of_positions(program)} <= {("4096",) * 2}
    bias = 2 * T * T if packed else 0
    assert bias <= program.memory_analysis().temp_size_in_bytes < bias + 2 * T * T


@for_gpu
def test_arms_of_a_vmap_are_more_rows_of_cudnns():
    q, k, v, ids = shapes(N=8, K=2)
    arms = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in (q, k, v)]
    program = compiled(h100(), "cuda", jax.vmap(value_and_gradients, (0, 0, 0, None)), *arms, ids)
    assert "bf16[3,8,4096,128]" in program.as_text()
