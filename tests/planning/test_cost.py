"""What is read out of compiled and traced programs."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax.planning import cost, hlo

LAYERS, ROWS, WIDTH = 5, 16, 64


@pytest.fixture(scope="module")
def program():
    """Layers over 8 devices, each layer's weight gathered, and a sum over all rows."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))

    def lies(shape, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    def f(x, w):
        y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
        return y.sum()

    x, w = lies((ROWS, WIDTH), "fsdp"), lies((LAYERS, WIDTH, WIDTH), None, "fsdp")
    return jax.jit(f).lower(x, w).compile()


def test_collectives_count_as_often_as_their_loop_turns(program):
    gathered, summed = cost.collectives(hlo.parse(program.as_text()))
    size = WIDTH * WIDTH * 4
    assert gathered == cost.Collective(
        "all-gather", 8, LAYERS, LAYERS * size, LAYERS * size * 7 // 8
    )
    assert summed == cost.Collective("all-reduce", 8, 1, 4, 2 * 4 * 7 // 8)


def test_traffic_counts_slices_and_loops(program):
    """At least each weight gathered and read, and far from the whole stack in every turn."""
    weights, x = LAYERS * WIDTH * WIDTH * 4, ROWS // 8 * WIDTH * 4
    moved = 3 * weights / 8 + 2 * weights  # a slice is made and gathered; a weight made and read
    activations = LAYERS * 8 * x
    assert moved < cost.traffic(hlo.parse(program.as_text())) < moved + activations


TPU = (Path(__file__).parent / "step.hlo").read_text()


def test_what_the_tpu_compiler_writes_is_read():
    """One gather in two parts, in a loop whose turns only its condition tells; a reduce-scatter in
    the form of a fused all-reduce; groups as a list and as an iota."""
    found = cost.collectives(hlo.parse(TPU))
    assert {each.kind: (each.group, each.count, each.bytes) for each in found} == {
        "all-gather": (8, 6, 6 * 8 * 4096 * 2),
        "reduce-scatter": (4, 1, 4096 * 16 * 2),
        "collective-permute": (16, 1, 64 * 512 * 2),
    }


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("[4,2]<=[8]", 2),
        ("{{0,1,2},{3,4,5}}", 3),
        ("mesh['a'=4,'b'=2] {'a'}", 4),
        ("mesh['a'=4,'b'=2] {'a', 'b'}", 8),
        ("mesh['a'=4,'b'=2] {'a':(2)2}", 2),
        ("{}", 16),
    ],
)
def test_group_sizes(groups, size):
    text = TPU.replace("{{0,2,4,6},{1,3,5,7}}", groups)
    assert [c.group for c in cost.collectives(hlo.parse(text)) if "reduce" in c.kind] == [size]


def flops(f, *args):
    return cost.flops(jax.jit(f).trace(*args).jaxpr)


def test_flops_of_a_scan_its_gradient_and_what_is_not_read():
    w, x = jnp.ones((LAYERS, WIDTH, WIDTH)), jnp.ones((ROWS, WIDTH))
    product = 2 * ROWS * WIDTH * WIDTH

    def f(x, w):
        y, _ = jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.sin(x @ w), None)), x, w)
        return y.sum()

    def unread(x, w):
        del_ = x @ w[0]
        return jax.lax.cond(x.sum() > 0, lambda: x @ w[1], lambda: x), del_

    assert flops(f, x, w) == LAYERS * product
    assert flops(jax.grad(f), x, w) == 3 * LAYERS * product
    assert flops(lambda x, w: unread(x, w)[0], x, w) == product


def test_flops_under_shard_map_are_those_of_all_devices():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    specs = PartitionSpec("fsdp"), PartitionSpec()
    matmul = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=specs, out_specs=specs[0])
    assert flops(matmul, jnp.ones((ROWS, WIDTH)), jnp.ones((WIDTH, 8))) == 2 * ROWS * WIDTH * 8
