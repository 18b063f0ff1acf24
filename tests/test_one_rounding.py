"""What is computed of a quantised weight is computed of what its format decodes, in float32, and
rounded once. A base that stands for float32 has nothing to round, and says what is exact."""

import functools

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import moved
from test_protocol_weights import quantized as own_format

import lora_jax as lora
from lora_jax.quant import FORMATS
from lora_jax.weights import dense, transpose

MERGEABLE = {name: cases.METHODS[name] for name in cases.MERGEABLE} | {
    "ia3_input": lora.IA3(scales="input"),
    "lora_by_layer": lora.LoRA(rank=(2, 0)),
}
DTYPES = {"bfloat16": (8, -133), "float16": (11, -24)}  # bits, and the smallest exponent
SHAPE = (2, 32, 24)
KEY = jax.random.key(0)


@functools.cache
def base(dtype: str, double_quant: bool = True):
    """A weight of each format and a plain one, all of the numbers that bfloat16 holds."""
    params = {name: cases.normal(7, *SHAPE).astype(jnp.bfloat16).astype(dtype)
              for name in (*FORMATS, "array")}  # fmt: skip
    for format in FORMATS:
        how = cases.format_options(format, 8, double_quant)
        params = lora.quantize(params, format, targets=format, **how)
    return params


@functools.cache
def delta_of(name: str):
    return moved(lora.lora_transform(base("float32"), MERGEABLE[name], targets=".*", key=KEY)[1])


def assert_rounded_once(rounded, exact):
    """Each entry lies within half a unit of its last place, but for the last bit of float32."""
    bits, smallest = DTYPES[rounded.dtype.name]
    rounded, exact = np.asarray(rounded, np.float64), np.asarray(exact, np.float64)
    _, exponent = np.frexp(exact)
    half = np.ldexp(0.5, np.maximum(exponent - bits, smallest))
    assert np.any(rounded != exact)
    assert (np.abs(rounded - exact) <= 1.001 * half + 1e-6 * np.abs(exact)).all()


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MERGEABLE)
def test_a_merged_weight(name, dtype):
    delta = delta_of(name)
    merged, exact = (lora.merge(base(kind), delta) for kind in (dtype, "float32"))
    bound = lora.bind(base(dtype), delta)
    for path, weight in merged.items():
        assert weight.dtype == dtype
        assert_rounded_once(weight, exact[path])
        if path == "nf4":
            chex.assert_trees_all_equal(dense(bound[path]), weight)
            chex.assert_trees_all_equal(
                dense(transpose(bound[path])) if name == "lora" else weight.mT, weight.mT
            )


@pytest.mark.sampled
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "full"])
def test_a_requantised_weight_has_the_codes_of_the_exact_sum(name, double_quant):
    delta = delta_of(name)
    again, exact = (
        lora.merge(base(dtype, double_quant), delta, requantize=True)
        for dtype in ("bfloat16", "float32")
    )
    for format in FORMATS:
        assert again[format].dtype == jnp.bfloat16
        chex.assert_trees_all_equal(jax.tree.leaves(again[format]), jax.tree.leaves(exact[format]))
    jitted = jax.jit(lora.merge, static_argnames="requantize")
    codes = jitted(base("bfloat16", double_quant), delta, requantize=True)["nf4"].codes
    assert np.mean(codes != again["nf4"].codes) < 0.01  # but for a sum on the border of two codes


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_an_init_from_the_weight_takes_what_is_decoded(init):
    method = lora.LoRA(rank=2, init=init)
    ours, exact = (
        lora.lora_transform({"nf4": base(kind)["nf4"]}, method, targets=".*", key=KEY)
        for kind in ("bfloat16", "float32")
    )
    assert ours[0]["nf4"].dtype == jnp.bfloat16
    chex.assert_trees_all_equal(jax.tree.leaves(ours), jax.tree.leaves(exact))


def test_norms_starts_and_extraction_take_what_is_decoded():
    half, exact = ({"nf4": base(kind)["nf4"]} for kind in ("bfloat16", "float32"))
    given = {"targets": ".*", "key": KEY}
    dora = [lora.lora_transform(tree, lora.DoRA(rank=2), **given)[1] for tree in (half, exact)]
    chex.assert_trees_all_equal(*dora)
    original = {"nf4": cases.normal(7, *SHAPE)}
    low = [lora.lora_transform(tree, lora.LoRA(rank=2), **given)[1] for tree in (half, exact)]
    for iterations in (1, 2):
        loftq = [
            lora.loftq_start(original, tree, delta, iterations=iterations)
            for tree, delta in zip((half, exact), low, strict=True)
        ]
        assert loftq[0][0]["nf4"].dtype == jnp.bfloat16
        chex.assert_trees_all_equal(*map(jax.tree.leaves, loftq))
    found = [
        lora.extract(tree, original, lora.LoRA(rank=2), targets=".*") for tree in (half, exact)
    ]
    chex.assert_trees_all_equal(*found)


def test_a_format_of_ones_own_need_not_say_more_than_its_dense_form():
    weight = own_format(cases.normal(0, 16, 8).astype(jnp.bfloat16))
    chex.assert_trees_all_equal(weight.dense_float32(), weight.dense().astype(jnp.float32))
    base, delta = lora.lora_transform({"w": weight}, lora.LoRA(rank=2), targets="w", key=KEY)
    update = lora.merge({"w": jnp.zeros((16, 8))}, moved(delta))["w"]
    merged = lora.merge(base, moved(delta))["w"]
    assert_rounded_once(merged, weight.dense().astype(jnp.float32) + update)
