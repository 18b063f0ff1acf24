"""The TPU kernel, compiled by the real compiler for chips that are not there.

JAX_PLATFORMS=cpu python -m pytest -n 0 -s tests/kernels/test_nf4_matmul_aot_tpu.py
"""

import importlib.util
import os
from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from lora_jax.kernels.nf4_matmul import mosaic_tpu, nf4_matmul

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu: see requirements-aot.txt"
)

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


@pytest.fixture(autouse=True)
def real_compilation():
    jax.config.update("jax_disable_most_optimizations", False)


@cache
def mesh(chip: str) -> jax.sharding.Mesh:
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])
    return jax.sharding.Mesh(topology.devices[:1], ("device",))


def compiled(chip: str, f, *arguments):
    sharding = jax.sharding.NamedSharding(mesh(chip), jax.P())
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arguments]
    with jax.sharding.use_abstract_mesh(mesh(chip).abstract_mesh):
        return jax.jit(f).trace(*placed).lower(lowering_platforms=("tpu",)).compile()


def weight(K: int, N: int, *layers: int):
    return (
        jax.ShapeDtypeStruct((*layers, K // 2, N), jnp.uint8),
        jax.ShapeDtypeStruct((*layers, K // 64, N), jnp.float32),
    )


def value_and_gradient(x, dy, codes, absmax, *, implementation=None):
    f = partial(nf4_matmul, implementation=implementation)
    y, vjp = jax.vjp(lambda x: f(x, codes, absmax), x)
    return y, *vjp(dy)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype, M, K, N", SHAPES)
def test_both_directions_compile_within_the_vmem_that_they_ask_for(dtype, M, K, N, chip):
    x, dy = (jax.ShapeDtypeStruct((M, d), dtype) for d in (K, N))
    f = partial(value_and_gradient, implementation="mosaic_tpu")
    program = compiled(chip, f, x, dy, *weight(K, N))
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
    program = compiled(chip, training_step, x, *stacked)
    assert program.as_text().count('custom_call_target="tpu_custom_call"') >= 2
    # Beside a checkpoint for each layer, less than two decoded layers at a time.
    checkpoints = (layers + 4) * 2 * x.size
    assert program.memory_analysis().temp_size_in_bytes < checkpoints + 2 * d * d


def training_step(x, codes, absmax):
    """A loss and its gradient through layers with a low-rank branch."""

    def loss(ab):
        def layer(x, weight):
            h = nf4_matmul(x, *weight) + (x @ ab[0]) @ ab[1]
            return x + jax.nn.silu(h), None

        y, _ = jax.lax.scan(jax.checkpoint(layer), x, (codes, absmax))
        return jnp.square(y.astype(jnp.float32)).mean()

    d = x.shape[-1]
    return jax.value_and_grad(loss)((jnp.ones((d, 16), x.dtype), jnp.zeros((16, d), x.dtype)))


def test_more_devices_take_it_inside_shard_map():
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    four = jax.sharding.Mesh(topology.devices, ("data",))
    sharded = jax.NamedSharding(four, jax.P("data"))
    whole = jax.NamedSharding(four, jax.P())
    x = jax.ShapeDtypeStruct((64, 4096), jnp.bfloat16, sharding=sharded)
    w = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole) for a in weight(4096, 4096)]
    rows = jax.shard_map(
        nf4_matmul,
        mesh=four,
        in_specs=(jax.P("data"), jax.P(), jax.P()),
        out_specs=jax.P("data"),
        check_vma=False,
    )
    with jax.sharding.use_abstract_mesh(four.abstract_mesh):
        lowered = jax.jit(rows).trace(x, *w).lower(lowering_platforms=("tpu",))
    assert 'custom_call_target="tpu_custom_call"' in lowered.compile().as_text()


def test_tiles_follow_the_generation():
    v5e, v6e = (
        mosaic_tpu.tiles(8192, 4096, 4096, 64, mesh(chip).devices[0].device_kind)
        for chip in ("v5e", "v6e")
    )
    assert v6e.m * v6e.n > v5e.m * v5e.n
