"""Leaves of params that are no concrete arrays: abstract ones, functions, strings, numbers."""

import dataclasses
import functools

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.fingerprint import fingerprint, shape_fingerprint
from lora_jax.methods import Method

KEY = jax.random.key(0)
ABSTRACT = {
    **{kind.__name__: entry for kind, entry in cases.REGISTRY.items()},
    "PiSSA": cases.Entry(lora.LoRA(rank=2, init="pissa")),
    "OLoRA": cases.Entry(lora.LoRA(rank=2, init="olora")),
    "a random prompt": cases.Entry(lora.Prompt(length=2, init="normal"), "embed"),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", ABSTRACT)
def test_abstract_params_give_the_same_shapes(name):
    """Of arrays and of four bits, by every method; where no value is needed, the same numbers."""
    entry = ABSTRACT[name]
    params = {"embed": cases.normal(0, 5, 8), "layers": {"k_proj": cases.normal(1, 2, 8, 8)}}
    for base in (params, lora.quantize(params, "nf4", targets="k_proj", block_size=8)):
        method = entry.method if isinstance(entry.method, Method) else entry.method(base)

        def make(params):
            transform = functools.partial(lora.lora_transform, targets=entry.targets, key=KEY)
            return transform(params, method)  # noqa: B023

        shapes = jax.eval_shape(lambda: base)  # noqa: B023
        found, expected = make(shapes), jax.eval_shape(make, base)
        chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
        assert lora.describe(*found) == lora.describe(*expected)
        if not method.reads_values:
            chex.assert_trees_all_equal(found[1], make(base)[1])


@dataclasses.dataclass(frozen=True)
class Opaque:
    """Has a shape, and is no array."""

    shape: tuple = (6, 6)


STRANGE = {"activation": jnp.tanh, "jitted": jax.jit(jnp.tanh), "name": "relu", "rate": 0.1,
           "count": 3, "flag": True, "dtype": np.float32, "jax_dtype": jnp.float32,
           "numpy": np.dtype("float32"), "object": Opaque(), "nothing": None}  # fmt: skip


def test_a_fingerprint_is_of_arrays():
    params = {"w": cases.normal(0, 8, 6)}
    for name in (fingerprint, shape_fingerprint):
        assert name({**params, "act": jnp.tanh, "rate": 0.1}) == name(params)


def test_leaves_that_are_no_arrays_pass_through():
    """An unpartitioned model's functions and settings, by identity."""
    params = {"w": cases.normal(0, 8, 6), **STRANGE, "inner": {"q_proj": cases.normal(1, 8, 8),
              "act": jnp.sin}}  # fmt: skip

    def strange(tree):
        return {k: v for k, v in tree.items() if k in STRANGE} | {"act": tree["inner"]["act"]}

    four_bits = lora.quantize(params, "nf4", block_size=8, targets="q_proj")
    trees = {"quantize": four_bits, "dequantize": lora.dequantize(four_bits)}
    for method in map(cases.METHODS.get, ("lora_variant", "full", "dora", "vera", "bottleneck")):
        targets = ("q_proj", "w") if method != lora.Full() else "w"
        base, delta = lora.lora_transform(params, method, targets=targets, key=KEY)
        weights = lora.bind(base, delta, dropout_key=KEY)
        mask = lora.trainable_mask(weights)
        assert jax.tree.structure(mask) == jax.tree.structure(weights)
        counted = lora.describe(base, delta)
        assert counted.all_params - counted.trainable_params == 48 + 64
        trees |= {"base": base, "bound": weights}
        if not isinstance(method, lora.Bottleneck):
            trees["merged"] = lora.merge(base, delta)
            trees["unmerged"] = lora.unmerge(trees["merged"], delta)
    over_bits = lora.lora_transform(four_bits, lora.LoRA(rank=2), targets="q_proj", key=KEY)
    trees["merged bits"] = lora.merge(*over_bits, requantize=True)
    for name, tree in trees.items():
        expected = strange(params)
        assert all(leaf is expected[k] for k, leaf in strange(tree).items()), name


@pytest.mark.parametrize("name", [name for name in STRANGE if name != "nothing"])
def test_a_target_that_is_no_array(name):
    params = {"w": cases.normal(0, 8, 6), name: STRANGE[name]}
    layouts = {name: lora.Layout()}
    with pytest.raises(ValueError, match=f"'{name}' matches {name}, but LoRA adapts matrices"):
        lora.lora_transform(params, lora.LoRA(rank=2), targets=name, key=KEY)
    for method, given in ((lora.Full(), None), (lora.LoRA(rank=2), layouts)):
        with pytest.raises(ValueError, match=f"{name} is a .*: only arrays and quantised weights"):
            lora.lora_transform(params, method, targets=name, key=KEY, layouts=given)
    with pytest.raises(ValueError, match=f"{name} is a .*, not an array"):
        lora.quantize(params, "nf4", targets=name, layouts=layouts)
