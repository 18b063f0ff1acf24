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
from aot import compiled, training_step, value_and_gradient, weight
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
def reports(real_compilation, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_RESOURCES", "1")


@cache
def mesh() -> jax.sharding.Mesh:
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=TARGET
    )
    return jax.sharding.Mesh(topology.devices, ("device",))


BY_NAME = {"implementation": "mosaic_gpu"}


def kernels_in(program) -> int:
    return program.as_text().count('custom_call_target="mosaic_gpu')


@pytest.mark.parametrize("dtype, M, K, N", SHAPES)
def test_both_directions_compile_without_spills(dtype, M, K, N, capfd):
    x, dy = (jax.ShapeDtypeStruct((M, d), dtype) for d in (K, N))
    f = partial(value_and_gradient, implementation="mosaic_gpu")
    program = compiled(mesh(), "cuda", f, x, dy, *weight(K, N))
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
    program = compiled(mesh(), "cuda", partial(training_step, **BY_NAME), x, *weight(d, d, layers))
    assert kernels_in(program) >= 2
    assert program.memory_analysis().temp_size_in_bytes < 2 * d * d, "a decoded weight"


@pytest.mark.parametrize("axes", [(0, None, None), (0, 0, 0)])
def test_arms_of_a_vmap_share_one_kernel(axes):
    x = jax.ShapeDtypeStruct((8, 16, 4096), jnp.bfloat16)
    layers = (8,) if axes[1] == 0 else ()
    program = compiled(
        mesh(),
        "cuda",
        jax.vmap(partial(nf4_matmul, **BY_NAME), axes),
        x,
        *weight(4096, 1024, *layers),
    )
    assert kernels_in(program) == 1


@pytest.mark.parametrize("rows", [1, 2048])
def test_it_is_left_to_xla_unless_asked_for(rows):
    """Until the kernel has run on a GPU."""
    x = jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16)
    assert kernels_in(compiled(mesh(), "cuda", nf4_matmul, x, *weight(4096, 4096))) == 0


def test_what_the_kernel_lacks_is_refused_by_name():
    f = partial(nf4_matmul, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="has no tiles for 4 rows, d_in = 4096 and d_out = 40"):
        compiled(
            mesh(), "cuda", f, jax.ShapeDtypeStruct((4, 4096), jnp.bfloat16), *weight(4096, 40)
        )
