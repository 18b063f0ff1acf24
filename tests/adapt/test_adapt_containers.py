"""Whole modules, with their functions and settings inside, go through every public function."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import assert_close, moved, normal
from flax import nnx

import lora_jax as lora

X = normal(0, 4, 16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """Of which every field is a leaf."""

    w: Any
    activation: Any
    name: str = "layer"
    repeats: int = 2


def plain():
    def run(layer, x):
        for _ in range(layer.repeats):
            x = layer.activation(x @ layer.w)
        return x

    return run, Layer(normal(1, 16, 16) / 4, jnp.tanh)


def equinox():
    eqx = pytest.importorskip("equinox")
    return lambda model, x: jax.vmap(model)(x), eqx.nn.MLP(16, 16, 16, 2, key=jax.random.key(0))


def nnx_module():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(16, 16, rngs=rngs)
            self.activation = nnx.gelu
            self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
            self.second = nnx.Linear(16, 16, rngs=rngs)

        def __call__(self, x):
            return self.second(self.dropout(self.activation(self.first(x))))

    return lambda model, x: model(x), Model(nnx.Rngs(0))


@pytest.mark.mixed_dtypes
@pytest.mark.parametrize("make", [plain, equinox, nnx_module], ids=lambda make: make.__name__)
def test_every_public_function_takes_them_as_they_are(make):
    run, model = make()
    layouts = lora.infer_layouts(run, model, X)
    found = sum(layout is not None for layout in layouts.values())
    method = lora.LoRA(rank=2)
    quantised = lora.quantize(model, "nf4", layouts=layouts, block_size=8)
    for given in (model, quantised):
        base, delta = lora.lora_transform(given, method, key=jax.random.key(0), layouts=layouts)
        delta = moved(delta, size=0.3)
        assert type(base) is type(model) and len(lora.describe(base, delta).rows) == found
        ours = lora.adapt(run)(lora.bind(base, delta), X)
        merged = lora.merge(base, delta)
        assert_close(ours, run(lora.dequantize(merged), X), rtol=1e-3, atol=1e-4)
    again = lora.unmerge(lora.merge(model, delta), delta)
    assert_close(run(again, X), run(model, X), rtol=1e-3, atol=1e-4)
    assert lora.extract(model, lora.merge(model, delta), method).keys() == delta.keys()
