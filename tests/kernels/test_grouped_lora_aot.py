"""`grouped_lora` compiled by the real compilers for TPUs and an H100 that are not there.

    JAX_PLATFORMS=cpu python -m pytest -n 0 -s tests/kernels/test_grouped_lora_aot.py

Of the Hopper kernel it prints what ptxas says, registers, and the shared memory of a thread block.
"""

import importlib.util
import os
import re
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from aot import compiled
from jax.experimental import topologies

from lora_jax.kernels.grouped_lora import grouped_lora

BF16, F32 = jnp.bfloat16, jnp.float32
CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
TARGET = Path(__file__).parent / "h100_sxm_target.textproto"
SHARED_MEMORY = 232_448  # bytes that one thread block of an H100 may have

pytestmark = pytest.mark.usefixtures("real_compilation")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu: see requirements-aot.txt"
)
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="no CUDA plugin: see requirements-aot.txt",
)


@cache
def mesh(chip: str) -> jax.sharding.Mesh:
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if chip == "h100":
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name="h100",
            topology="1x1x1",
            target_config=TARGET.read_text(),
        )
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])
    return jax.sharding.Mesh(topology.devices[:1], ("device",))


def shapes(N, S, d_in, d_out, w, *, P=64, ranks=8, dtype=BF16, page_dtype=None):
    page_dtype = page_dtype or dtype
    return (
        jax.ShapeDtypeStruct((N, d_in), dtype),
        jax.ShapeDtypeStruct((P, ranks, d_in), page_dtype),
        jax.ShapeDtypeStruct((P, ranks, d_out), page_dtype),
        jax.ShapeDtypeStruct((S, w), jnp.int32),
        jax.ShapeDtypeStruct((S,), jnp.int32),
    )


def value_and_gradients(x, a, b, pages, sizes, *, implementation=None):
    f = partial(grouped_lora, implementation=implementation)
    y, vjp = jax.vjp(lambda x, a, b: f(x, a, b, pages, sizes), x, a, b)
    return y, *vjp(y)


def kernels_in(program) -> int:
    return len(re.findall('custom_call_target="(?:tpu_custom_call|mosaic_gpu)', program.as_text()))


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    "given",
    [
        dict(N=8, S=8, d_in=4096, d_out=4096, w=2),
        dict(N=1, S=1, d_in=576, d_out=192, w=8),
        dict(N=2048, S=32, d_in=4096, d_out=14336, w=8),
        dict(N=4096, S=8, d_in=14336, d_out=4096, w=1),
        dict(N=70, S=3, d_in=200, d_out=1000, w=4, dtype=F32),
        dict(N=64, S=8, d_in=4096, d_out=1024, w=2, page_dtype=F32),
        dict(N=64, S=8, d_in=4096, d_out=1024, w=2, dtype=F32, page_dtype=BF16),
    ],
)
def test_both_directions_compile_for_a_tpu(given, chip):
    f = partial(value_and_gradients, implementation="mosaic_tpu")
    program = compiled(mesh(chip), "tpu", f, *shapes(**given))
    assert kernels_in(program) == 2


@needs_libtpu
@pytest.mark.parametrize("given", [dict(N=8, S=8), dict(N=1024, S=4)])
def test_a_tpu_takes_the_kernel_and_holds_nothing_of_the_banks_size(given):
    temporary = []
    for P in (64, 1024):
        program = compiled(
            mesh("v5e"), "tpu", grouped_lora, *shapes(**given, d_in=4096, d_out=4096, w=2, P=P)
        )
        assert kernels_in(program) == 1
        temporary.append(program.memory_analysis().temp_size_in_bytes)
    assert max(temporary) < 2**20
    print(given, temporary)


@needs_libtpu
def test_what_vmem_does_not_hold_is_xlas():
    given = dict(N=8, S=8, d_in=262144, d_out=4096, w=8)
    assert kernels_in(compiled(mesh("v5e"), "tpu", grouped_lora, *shapes(**given))) == 0
    f = partial(grouped_lora, implementation="mosaic_tpu")
    with pytest.raises(ValueError, match="has no tiles for 8 tokens, d_in = 262144"):
        compiled(mesh("v5e"), "tpu", f, *shapes(**given))


@needs_libtpu
def test_members_of_a_vmap_run_in_turn():
    one = shapes(N=8, S=8, d_in=512, d_out=512, w=2)
    pages = jax.ShapeDtypeStruct((3, *one[3].shape), jnp.int32)
    f = jax.vmap(grouped_lora, (None, None, None, 0, None))
    assert kernels_in(compiled(mesh("v5e"), "tpu", f, *one[:3], pages, one[4])) == 1


@needs_cuda
@pytest.mark.parametrize("given", [dict(N=8, S=8), dict(N=1024, S=16)])
def test_an_h100_holds_and_makes_nothing_of_the_banks_size(given):
    held = []
    for P in (64, 1000):
        program = compiled(
            mesh("h100"), "cuda", grouped_lora, *shapes(**given, d_in=4096, d_out=4096, w=2, P=P)
        )
        held.append(program.memory_analysis().temp_size_in_bytes)
    assert not re.search(r"= \w+\[1000,8,4096\]\S* (?!parameter)", program.as_text())
    assert abs(held[0] - held[1]) < 2**16
    copied = given["S"] * 2 * 2 * 8 * 4096 * 2
    assert held[1] < 2**16 if given["N"] == 8 else 8 * (copied + given["N"] * 4096 * 4)
    print(given, held)


@needs_cuda
def test_ragged_dot_on_an_h100_is_dense_over_all_groups():
    """Why XLA gathers there: a copy of x for every group, masked, is multiplied."""

    def held(P):
        x, a, b, *_ = shapes(N=256, S=1, d_in=4096, d_out=4096, w=1, P=P)

        def f(x, a, b, sizes):
            h = jax.lax.ragged_dot(x, jnp.swapaxes(a, 1, 2), sizes)
            return jax.lax.ragged_dot(h, b, sizes)

        sizes = jax.ShapeDtypeStruct((P,), jnp.int32)
        return compiled(mesh("h100"), "cuda", f, x, a, b, sizes).memory_analysis()

    few, many = (held(P).temp_size_in_bytes for P in (64, 256))
    print(few, many)
    assert few >= 64 * 256 * 4096 * 2 and many > 3 * few


BY_NAME = partial(grouped_lora, implementation="mosaic_gpu")


@needs_cuda
@pytest.mark.parametrize(
    "given",
    [
        dict(N=1, S=1, d_in=576, d_out=192, w=8),
        dict(N=8, S=8, d_in=4096, d_out=4096, w=2),
        dict(N=64, S=8, d_in=4096, d_out=1024, w=32),
        dict(N=2048, S=32, d_in=4096, d_out=14336, w=8),
        dict(N=4096, S=8, d_in=14336, d_out=4096, w=1, ranks=64),
        dict(N=70, S=3, d_in=192, d_out=1024, w=3),
        dict(N=64, S=8, d_in=4096, d_out=1024, w=2, ranks=24),
    ],
)
def test_both_directions_compile_for_an_h100_without_spills(given, capfd, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_RESOURCES", "1")
    f = partial(value_and_gradients, implementation="mosaic_gpu")
    program = compiled(mesh("h100"), "cuda", f, *shapes(**given))
    report = "".join(capfd.readouterr())
    assert kernels_in(program) == 4  # narrow and widen, each in both directions
    registers = re.findall(r"ptxas info.*Used (\d+) registers", report)
    spilled = re.findall(r"(\d+) bytes spill stores", report)
    shared = [int(n) for n in re.findall(r"smem_scratch_bytes=(\d+)", report)]
    assert len(registers) == len(shared) in (2, 4)  # two where a direction's are the other's
    assert max(shared) <= SHARED_MEMORY and spilled and not any(map(int, spilled))
    assert "serialized" not in report, "wgmma waits where the program does not"
    with capfd.disabled():
        print(f"{given}: registers {registers}, shared memory {shared}")


@needs_cuda
@pytest.mark.parametrize(
    "given", [dict(N=8, S=8, w=2), dict(N=32, S=32, w=8), dict(N=2048, S=8, w=2)]
)
def test_the_hopper_kernel_holds_nothing_of_the_banks_size(given):
    """Beside the arguments: the parts of h, h, and items' rows of y, one more block a segment."""

    def program(f, P):
        return compiled(mesh("h100"), "cuda", f, *shapes(**given, d_in=4096, d_out=4096, P=P))

    few, many, gathering = program(BY_NAME, 64), program(BY_NAME, 1000), program(grouped_lora, 1000)
    assert kernels_in(many) == 2
    assert not re.search(r"= \w+\[1000,8,4096\]\S* (?!parameter)", many.as_text())
    held, beside, by_xla = (p.memory_analysis().temp_size_in_bytes for p in (few, many, gathering))
    rows = given["N"] + given["S"] * min(max(given["N"] // given["S"], 8), 64)
    assert held == beside < rows * (4096 * 2 + given["w"] * 8 * 4 * 9)
    print(given, held, "XLA:", by_xla)


@needs_cuda
def test_hopper_kernels_of_a_vmap_run_in_turn():
    one = shapes(N=8, S=8, d_in=512, d_out=512, w=2)
    pages = jax.ShapeDtypeStruct((3, *one[3].shape), jnp.int32)
    f = jax.vmap(BY_NAME, (None, None, None, 0, None))
    assert kernels_in(compiled(mesh("h100"), "cuda", f, *one[:3], pages, one[4])) == 2


@needs_cuda
def test_an_h100_is_left_to_xla_unless_asked_for_and_refused_by_name():
    """Until the kernel has run on a GPU."""
    given = dict(N=8, S=8, d_in=4096, d_out=4096, w=2)
    assert kernels_in(compiled(mesh("h100"), "cuda", grouped_lora, *shapes(**given))) == 0
    for change, message in [
        (dict(dtype=F32), "takes bfloat16, and x is float32 and the pages are float32"),
        (dict(page_dtype=F32), "takes bfloat16, and x is bfloat16 and the pages are float32"),
        (dict(d_out=100), "has no tiles for 8 tokens, d_in = 4096 and d_out = 100"),
        (dict(w=33), "with 33 pages of 8 ranks"),
    ]:
        with pytest.raises(ValueError, match=message):
            compiled(mesh("h100"), "cuda", BY_NAME, *shapes(**given | change))
