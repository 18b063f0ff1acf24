"""`grouped_lora` on this platform: values, gradients, composition, cost, and what it refuses."""

import dataclasses
import re
from functools import partial

import groups
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels.grouped_lora import gathering, grouped_lora, reference

BF16, F32 = groups.BFLOAT16, np.float32
SEGMENTS = {  # sizes, and tokens behind them
    "one token each": ([1] * 5, 0),
    "one of many": ([40], 0),
    "ragged, with empty ones": ([3, 0, 17, 1, 0, 9], 4),
    "long beside short": ([1, 130, 2], 1),
    "none at all": ([0, 0], 6),
}


RAGGED = "ragged, with empty ones"


@pytest.mark.parametrize(
    "name, dtype, page_dtype",
    [(name, F32, F32) for name in SEGMENTS]
    + [("one token each", BF16, BF16), (RAGGED, BF16, BF16), (RAGGED, BF16, F32)]
    + [(RAGGED, F32, BF16)],
)
def test_values_and_gradients_are_those_of_float64(name, dtype, page_dtype):
    sizes, rest = SEGMENTS[name]
    p = groups.problem(sizes, rest=rest, dtype=dtype, page_dtype=page_dtype)
    dy = groups.cotangent(p)
    found = jax.jit(partial(groups.value_and_gradients, grouped_lora))(p, dy)
    for actual, expected in zip(found, groups.exact(p, dy), strict=True):
        groups.assert_near(actual, expected, computed=dtype)
    assert [leaf.dtype for leaf in found] == [dtype, dtype, page_dtype, page_dtype]
    groups.assert_near(reference.grouped(*p.arrays()), groups.exact(p)[0])


jax.tree_util.register_dataclass(
    groups.Problem, [field.name for field in dataclasses.fields(groups.Problem)], []
)


@pytest.mark.parametrize("tokens", [1, 6])
def test_segments_of_one_size_need_no_sizes(tokens):
    p = groups.problem([tokens] * 4, dtype=F32)
    x, a, b, pages, sizes = p.arrays()
    one, other = grouped_lora(x, a, b, pages), grouped_lora(x, a, b, pages, sizes)
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


def test_blocks_follow_the_mean_length_of_a_segment():
    assert [gathering.block_size(n, 8) for n in (1, 8, 15, 16, 100, 10**4)] == [1, 1, 1, 2, 8, 64]


def test_it_runs_in_a_rematerialised_scan_under_vmap_and_under_shard_map():
    p = groups.problem([2, 3, 3], dtype=F32, d_in=24, d_out=24)
    x, a, b, pages, sizes = p.arrays()

    def layer(x, factors):
        return x + grouped_lora(x, *factors, pages, sizes), None

    def run(x, factors):
        return jax.lax.scan(jax.checkpoint(layer), x, factors)[0]

    stacked = jnp.stack([a, a]), jnp.stack([b, b])
    y = jax.jit(run)(x, stacked)
    once = np.asarray(x + grouped_lora(x, a, b, pages, sizes))
    twice = once + np.asarray(grouped_lora(jnp.asarray(once), a, b, pages, sizes))
    np.testing.assert_allclose(y, twice, rtol=0, atol=1e-5)
    dx = jax.jit(jax.grad(lambda x: run(x, stacked).sum()))(x)
    assert np.isfinite(dx).all()

    both = jax.vmap(grouped_lora, (0, None, None, 0, None))(
        jnp.stack([x, 2 * x]), a, b, jnp.stack([pages, pages[::-1]]), sizes
    )
    groups.assert_near(both[1], 2 * groups.exact(dataclasses.replace(p, pages=p.pages[::-1]))[0])

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.shard_map(
        grouped_lora,
        mesh=mesh,
        in_specs=(jax.P("data"), jax.P(), jax.P(), jax.P(), jax.P("data")),
        out_specs=jax.P("data"),
    )
    halves = jnp.array([2, 1, 1, 1, 1, 2], jnp.int32)
    y = jax.jit(rows)(x, a, b, pages, halves)
    for part, half in ((slice(0, 4), halves[:3]), (slice(4, 8), halves[3:])):
        want = grouped_lora(x[part], a, b, pages, half)
        np.testing.assert_allclose(y[part], want, rtol=0, atol=2e-6)


def cost(f, P, N, S, w, sizes=True):
    shape = jax.ShapeDtypeStruct
    arguments = [shape((N, 128), F32), shape((P, 8, 128), F32), shape((P, 8, 64), F32)]
    arguments += [shape((S, w), np.int32)] + [shape((S,), np.int32)] * sizes
    return jax.jit(f).lower(*arguments).compile().cost_analysis()


@pytest.mark.optimized
@pytest.mark.parametrize("N, S, sizes", [(8, 8, True), (256, 8, True), (256, 8, False)])
def test_flops_follow_tokens_and_pages_in_use_not_the_bank(N, S, sizes):
    few, many, wide, long = (
        cost(grouped_lora, *of, sizes)
        for of in ((64, N, S, 2), (1024, N, S, 2), (64, N, S, 4), (64, 2 * N, 2 * S, 2))
    )
    assert few["flops"] == many["flops"]
    padded = 2 if sizes and N > S else 1
    assert few["flops"] < 2 * padded * N * 2 * 8 * 2 * (128 + 64)
    assert wide["flops"] / few["flops"] == pytest.approx(2, rel=0.1)
    assert long["flops"] / few["flops"] == pytest.approx(2, rel=0.1)


def read_by(P):
    """Bytes that the compiled program reads or writes beside the bank, which it counts whole where
    a gather names it."""
    bank = P * 8 * (128 + 64) * 4
    return cost(grouped_lora, P, 8, 8, 2)["bytes accessed"] - bank


@pytest.mark.optimized
def test_no_page_is_read_but_those_in_use():
    p = groups.problem([1, 1, 2], dtype=F32)
    assert np.isfinite(grouped_lora(*p.arrays())).all()  # page 0 holds no number
    assert read_by(1024) <= read_by(64) * 1.01
    text = jax.jit(grouped_lora).lower(*p.arrays()).compile().as_text()
    P, r, d_in = p.a.shape
    of_the_bank = rf"= f32\[{P},{r},{d_in}\]\S* (?!parameter)\w+"
    assert not re.search(of_the_bank, text), "a copy of the bank"


@pytest.mark.optimized
def test_ragged_dot_costs_every_page():
    """Why it is not taken: on a CPU, as for CUDA, the product is dense over all groups."""

    def ragged(P):
        def f(x, a, b, sizes):
            h = jax.lax.ragged_dot(x, jnp.swapaxes(a, 1, 2), sizes)
            return jax.lax.ragged_dot(h, b, sizes)

        shape = jax.ShapeDtypeStruct
        arguments = shape((64, 128), F32), shape((P, 8, 128), F32), shape((P, 8, 64), F32)
        lowered = jax.jit(f).lower(*arguments, shape((P,), np.int32))
        return lowered.compile().cost_analysis()["flops"]

    assert ragged(256) > 3 * ragged(64)


def refuses(message, *arguments, **kwargs):
    with pytest.raises(ValueError, match=re.escape(message)):
        grouped_lora(*arguments, **kwargs)


def test_arguments_that_do_not_fit_are_refused():
    x, a, b, pages, sizes = groups.problem([2, 3], dtype=F32).arrays()
    refuses("x is float16", x.astype(np.float16), a, b, pages, sizes)
    refuses("a float32 and b bfloat16", x, a, b.astype(BF16), pages, sizes)
    refuses("are not [N, d_in], [P, r, d_in]", x[:, :3], a, b, pages, sizes)
    refuses("are not [N, d_in], [P, r, d_in]", x, a[None], b, pages, sizes)
    refuses("differ in pages or in ranks", x, a, b[:, :4], pages, sizes)
    refuses("pages are float32", x, a, b, pages.astype(F32), sizes)
    refuses("5 tokens are not 2 segments of one size", x, a, b, pages)
    refuses("one for each of 2 segments", x, a, b, pages, sizes[:1])


def test_a_kernel_asked_for_by_name_never_falls_back():
    p = groups.problem([2, 3], dtype=F32).arrays()
    needs = "'mosaic_tpu' needs a TPU, and this program is for a cpu"
    refuses(needs, *p, implementation="mosaic_tpu")
    needs = "'mosaic_gpu' needs a Hopper GPU, and this program is for a cpu"
    refuses(needs, *p, implementation="mosaic_gpu")
    refuses("'triton' is not one of xla, mosaic_gpu, mosaic_tpu", *p, implementation="triton")
    grouped_lora(*p, implementation="xla")
