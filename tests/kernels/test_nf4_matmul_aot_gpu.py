"""The Hopper kernel, compiled by the real compiler for an H100 that is not there.

    JAX_PLATFORMS=cpu python -m pytest -n 0 -s tests/kernels/test_nf4_matmul_aot_gpu.py

The print-out is ptxas's: registers, spills; and the shared memory that a thread block asks for.
"""

import importlib.util
import re
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from lora_jax.kernels.nf4_matmul import nf4_matmul

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="no CUDA plugin: see requirements-aot.txt",
)

TARGET = (Path(__file__).parent / "h100_sxm_target.textproto").read_text()
SHARED_MEMORY = 232_448  # bytes that one thread block may have
SHAPES = [
    (jnp.bfloat16, 1, 4096, 4096),
    (jnp.bfloat16, 16, 4096, 14336),
    (jnp.bfloat16, 64, 14336, 4096),
    (jnp.bfloat16, 256, 4096, 1024),
    (jnp.bfloat16, 5, 256, 512),
    (jnp.float32, 1, 4096, 4096),
    (jnp.float32, 40, 4096, 1024),
]


@pytest.fixture(autouse=True)
def real_compilation(monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_RESOURCES", "1")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@cache
def mesh() -> jax.sharding.Mesh:
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=TARGET
    )
    return jax.sharding.Mesh(topology.devices, ("device",))


def compiled(f, *arguments):
    sharding = jax.sharding.NamedSharding(mesh(), jax.P())
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arguments]
    with jax.sharding.use_abstract_mesh(mesh().abstract_mesh):
        return jax.jit(f).trace(*placed).lower(lowering_platforms=("cuda",)).compile()


def weight(K: int, N: int, *layers: int):
    return (
        jax.ShapeDtypeStruct((*layers, K // 2, N), jnp.uint8),
        jax.ShapeDtypeStruct((*layers, K // 64, N), jnp.float32),
    )


def value_and_gradient(x, dy, codes, absmax, *, implementation=None):
    f = partial(nf4_matmul, implementation=implementation)
    y, vjp = jax.vjp(lambda x: f(x, codes, absmax), x)
    return y, *vjp(dy)


def kernels_in(program) -> int:
    return program.as_text().count('custom_call_target="mosaic_gpu')


@pytest.mark.parametrize("dtype, M, K, N", SHAPES)
def test_both_directions_compile_without_spills(dtype, M, K, N, capfd):
    x, dy = (jax.ShapeDtypeStruct((M, d), dtype) for d in (K, N))
    f = partial(value_and_gradient, implementation="mosaic_gpu")
    program = compiled(f, x, dy, *weight(K, N))
    report = "".join(capfd.readouterr())
    assert kernels_in(program) == 2
    registers = re.findall(r"ptxas info.*Used (\d+) registers", report)
    spilled = re.findall(r"(\d+) bytes spill stores", report)
    shared = [int(n) for n in re.findall(r"smem_scratch_bytes=(\d+)", report)]
    assert len(registers) == len(shared) == 2 and max(shared) <= SHARED_MEMORY
    assert spilled and not any(map(int, spilled))
    with capfd.disabled():
        print(f"{jnp.dtype(dtype)} {M} x {K} x {N}: registers {registers}, shared memory {shared}")


def test_a_training_step_over_scanned_layers_takes_the_kernel():
    layers, d = 4, 4096
    x = jax.ShapeDtypeStruct((2, 8, d), jnp.bfloat16)
    program = compiled(training_step, x, *weight(d, d, layers))
    assert kernels_in(program) >= 2
    assert program.memory_analysis().temp_size_in_bytes < 2 * d * d, "a decoded weight"


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


def test_many_rows_are_left_to_xla_unless_asked_for():
    x = jax.ShapeDtypeStruct((2048, 4096), jnp.bfloat16)
    assert kernels_in(compiled(nf4_matmul, x, *weight(4096, 4096))) == 0


def test_what_the_kernel_lacks_is_refused_by_name():
    f = partial(nf4_matmul, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="has no tiles for 4 rows, d_in = 4096 and d_out = 40"):
        compiled(f, jax.ShapeDtypeStruct((4, 4096), jnp.bfloat16), *weight(4096, 40))
