"""The TPU kernel, compiled by the real compiler for chips that are not there.

JAX_PLATFORMS=cpu python -m pytest -n 0 -s tests/kernels/test_nf4_matmul_aot_tpu.py
"""

import importlib.util
import os
from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest
from aot import compiled, on, training_step, value_and_gradient, weight
from jax.experimental import topologies

from lora_jax.kernels.nf4_matmul import mosaic_tpu, nf4_matmul

pytestmark = [
    pytest.mark.usefixtures("real_compilation"),
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="no libtpu: see requirements-aot.txt"
    ),
]

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# Llama-3-8B's matrices, and small ones that are ragged both ways: rows, d_in, d_out.
SHAPES = [
    (jnp.bfloat16, 1, 4096, 4096),
    (jnp.bfloat16, 2048, 4096, 14336),
    (jnp.bfloat16, 16, 14336, 4096),
    (jnp.bfloat16, 1030, 4096, 1024),
    (jnp.bfloat16, 40, 192, 40),
    (jnp.bfloat16, 7, 576, 1000),
    (jnp.float32, 7, 4096, 4096),
    (jnp.float32, 300, 192, 40),
]


@cache
def mesh(chip: str) -> jax.sharding.Mesh:
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])
    return jax.sharding.Mesh(topology.devices[:1], ("device",))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype, M, K, N", SHAPES)
def test_both_directions_compile_within_the_vmem_that_they_ask_for(dtype, M, K, N, chip):
    x, dy = (jax.ShapeDtypeStruct((M, d), dtype) for d in (K, N))
    f = partial(value_and_gradient, implementation="mosaic_tpu")
    program = compiled(mesh(chip), "tpu", f, x, dy, *weight(K, N))
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 2
    temporary = program.memory_analysis().temp_size_in_bytes
    print(f"{chip} {jnp.dtype(dtype)} {M} x {K} x {N}: {temporary:,} bytes of HBM beside arguments")
    if K * N >= 2**20:  # not the weight: at most its absmax, laid out again
        assert temporary <= K * N / 64 * 8


@pytest.mark.parametrize("chip", CHIPS)
def test_a_training_step_over_scanned_layers_takes_the_kernel(chip):
    layers, d = 4, 2048
    x = jax.ShapeDtypeStruct((2, 64, d), jnp.bfloat16)
    stacked = weight(d, d, layers)
    program = compiled(mesh(chip), "tpu", training_step, x, *stacked)
    assert program.as_text().count('custom_call_target="tpu_custom_call"') >= 2
    # Beside a checkpoint for each layer, less than two decoded layers at a time.
    checkpoints = (layers + 4) * 2 * x.size
    assert program.memory_analysis().temp_size_in_bytes < checkpoints + 2 * d * d


@pytest.mark.parametrize("axes", [(0, None, None), (0, 0, 0)])
def test_arms_of_a_vmap_share_one_kernel(axes):
    x = jax.ShapeDtypeStruct((8, 16, 4096), jnp.bfloat16)
    layers = (8,) if axes[1] == 0 else ()
    program = compiled(
        mesh("v5e"), "tpu", jax.vmap(nf4_matmul, axes), x, *weight(4096, 1024, *layers)
    )
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    assert ("bf16[128,1024]" in text) == (axes[1] is None)  # more rows, or a loop over weights


@pytest.mark.parametrize("manual", [True, False])
def test_more_devices_take_the_kernel_inside_shard_map_alone(manual):
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    four = jax.sharding.Mesh(topology.devices, ("data",))
    specs = jax.P("data"), jax.P(), jax.P()
    shaped = (jax.ShapeDtypeStruct((64, 4096), jnp.bfloat16), *weight(4096, 4096))
    arguments = [on(four, spec, a) for a, spec in zip(shaped, specs, strict=True)]
    rows = jax.shard_map(
        nf4_matmul, mesh=four, in_specs=specs, out_specs=jax.P("data"), check_vma=False
    )
    with jax.sharding.use_abstract_mesh(four.abstract_mesh):
        traced = jax.jit(rows if manual else nf4_matmul).trace(*arguments)
        program = traced.lower(lowering_platforms=("tpu",)).compile()
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == manual


def test_tiles_follow_the_generation():
    v5e, v6e = (
        mosaic_tpu.tiles(8192, 4096, 4096, 64, mesh(chip).devices[0].device_kind)
        for chip in ("v5e", "v6e")
    )
    assert v6e.m * v6e.n > v5e.m * v5e.n
