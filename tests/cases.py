"""The trees, methods and small models that properties are tested over."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax.models import llama
from lora_jax.models.llama import LlamaConfig
from lora_jax.quant import FORMATS, Blockwise
from lora_jax.weights import scan_layers

METHODS = {
    "lora": lora.LoRA(rank=2, alpha=4.0),
    "lora_variant": lora.LoRA(rank=2, scaling="rslora", init="gaussian", dropout=0.5),
    "full": lora.Full(),
    "dora": lora.DoRA(rank=2, alpha=2.0, dropout=0.5),
    "ia3": lora.IA3(),
    "vera": lora.VeRA(rank=4, dropout=0.5),
    "adalora": lora.AdaLoRA(rank=3, target_rank=2, total_steps=10, alpha=6.0, dropout=0.5),
    "bottleneck": lora.Bottleneck(size=2, activation="gelu"),
}
MERGEABLE = [name for name in METHODS if not name.startswith("bottleneck")]
X = np.linspace(-1, 1, 18, dtype=np.float32).reshape(3, 6)


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """A method as the grid of tests/test_grid.py tries it.

    Attributes:
      method: an instance, or what makes one of a params tree.
      targets: where the grid's model has a place for it.
      changes_at_once: whether even a fresh one changes the model's output: by random rows, or by
        the trained adapters that it holds.
    """

    method: Any
    targets: str = "k_proj"
    changes_at_once: bool = False


# Every method that the library exports: a new one wants a line here.
REGISTRY = {
    lora.LoRA: Entry(METHODS["lora"]),
    lora.DoRA: Entry(METHODS["dora"]),
    lora.VeRA: Entry(METHODS["vera"]),
    lora.AdaLoRA: Entry(METHODS["adalora"]),
    lora.IA3: Entry(METHODS["ia3"]),
    lora.LoHa: Entry(lora.LoHa(rank=2)),
    lora.Bottleneck: Entry(METHODS["bottleneck"]),
    lora.Fusion: Entry(
        lambda params: lora.Fusion(adapters=_bottlenecks(params)), changes_at_once=True
    ),
    lora.Prompt: Entry(lora.Prompt(length=2), "embed", changes_at_once=True),
    lora.Prefix: Entry(lora.Prefix(length=2), changes_at_once=True),
    lora.Full: Entry(METHODS["full"]),
}


# Formats that share a storage differ in a codebook alone: one of these, and every other format.
CODEBOOKS = [name for name, kind in FORMATS.items() if issubclass(kind, Blockwise)]
STORAGES = ["nf4", *(name for name in FORMATS if name not in CODEBOOKS)]


def format_options(format: str, block_size: int, double_quant: bool = True) -> dict[str, Any]:
    """Of these options, those that a format has; its own block size where it has not this one."""
    kind = FORMATS[format]
    return {
        "block_size": block_size if block_size in kind.block_sizes else kind.default_block_size,
        "double_quant": double_quant and kind.doubled is not None,
    }


def _bottlenecks(params) -> list[Any]:
    def made(size):
        method = lora.Bottleneck(size=size)
        return lora.lora_transform(params, method, targets="k_proj", key=jax.random.key(0))[1]

    return [moved(made(size), seed=size) for size in (1, 2)]


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A params tree and the model that reads it, `apply(weights, x [B, 6]) -> [B, n]`."""

    params: Any
    apply: Callable[[Any, jax.Array], jax.Array]


@flax.struct.dataclass
class Pair:
    first: Any
    second: Any


def normal(seed: int, *shape: int) -> jax.Array:
    """Drawn by numpy and put: what JAX draws or converts, it compiles for every new shape."""
    return jax.device_put(drawn(seed, *shape))


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def nested() -> Case:
    params = {
        "block": {"q_proj": normal(1, 6, 5), "bias": normal(2, 5)},
        "out": {"down_proj": normal(3, 5, 4)},
    }

    def apply(w, x):
        y = lora.linear(x, w["block"]["q_proj"]) + w["block"]["bias"][None]
        return lora.linear(jnp.tanh(y), w["out"]["down_proj"])

    return Case(params, apply)


@functools.cache
def layer_list() -> Case:
    params = {"layers": [{"q_proj": normal(i, 6, 6)} for i in range(3)]}

    def apply(w, x):
        for layer in w["layers"]:
            x = jnp.tanh(lora.linear(x, layer["q_proj"]))
        return x

    return Case(params, apply)


@functools.cache
def stacked() -> Case:
    params = {"layers": {"q_proj": normal(4, 3, 6, 6)}}

    def apply(w, x):
        def layer(x, weights):
            return jnp.tanh(lora.linear(x, weights["q_proj"])), None

        return scan_layers(layer, x, w["layers"])[0]

    return Case(params, jax.jit(apply))


@functools.cache
def struct() -> Case:
    def apply(w, x):
        return lora.linear(jnp.tanh(lora.linear(x, w.first)), w.second)

    return Case(Pair(normal(5, 6, 5), normal(6, 5, 4)), apply)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(5)(x))
        return nn.Dense(4)(x)


@functools.cache
def linen() -> Case:
    params = Net().init(jax.random.key(7), X)

    def apply(w, x):
        for i, name in enumerate(("Dense_0", "Dense_1")):
            layer = w["params"][name]
            x = lora.linear(jnp.tanh(x) if i else x, layer["kernel"]) + layer["bias"][None]
        return x

    return Case(params, apply)


TREES = {
    "nested": nested,
    "list": layer_list,
    "stacked": stacked,
    "struct": struct,
    "linen": linen,
}
# LoRA on trees of every kind, every method on stacked layers, and two of the others unstacked.
PAIRS = [
    (tree, method)
    for tree in TREES
    for method in METHODS
    if method == "lora"
    or tree == "stacked"
    or (tree, method) in {("nested", "lora_variant"), ("linen", "full")}
]


@functools.cache
def _transform(case: Case, rules: tuple, targets):
    method = dict(rules) if isinstance(rules, tuple) else rules
    return lora.lora_transform(case.params, method, targets=targets, key=jax.random.key(0))


def transform(case: Case, method, targets="all-linear"):
    """What `lora_transform` gives, computed once for all tests."""
    rules = tuple(method.items()) if isinstance(method, dict) else method
    made = _transform(case, rules, targets if isinstance(targets, str) else tuple(targets))
    return jax.tree.map(lambda leaf: leaf, made)  # containers of the caller's own


def moved(delta, seed: int = 1, size: float = 0.3):
    """The delta after some training: every trained leaf redrawn, so that nothing is zero."""
    seeds = iter(range(1000 * seed, 1000 * (seed + 1)))
    return jax.tree.map(
        lambda leaf, trains: (
            jax.device_put(np.float32(size) * drawn(next(seeds), *leaf.shape)) if trains else leaf
        ),
        delta,
        lora.trainable_mask(delta),
    )


def tiny_llama(**changes) -> LlamaConfig:
    values = dict(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4,
        num_kv_heads=2, head_dim=4, context_length=64,
    )  # fmt: skip
    return LlamaConfig(**(values | changes))


@functools.cache
def llama_params(config: LlamaConfig):
    shapes = jax.eval_shape(lambda: llama.init(config, key=jax.random.key(0)))
    seeds = iter(range(100))

    def draw(path, leaf):
        if "norm" in jax.tree_util.keystr(path):
            return np.float32(1) + np.float32(0.1) * drawn(next(seeds), *leaf.shape)
        return drawn(next(seeds), *leaf.shape) / np.float32(np.sqrt(leaf.shape[-2]))

    return jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes))


def llama_case(**changes):
    """A tiny random Llama: config, params, tokens `[2, 7]`."""
    config = tiny_llama(**changes)
    tokens = np.random.default_rng(3).integers(0, config.vocab_size, (2, 7), dtype=np.int32)
    return config, dict(llama_params(config)), jax.device_put(tokens)


def llama_delta(params, method, seed: int = 0, size: float = 0.3, **kwargs):
    """A delta after some training; in one compilation, without what `moved` redraws."""

    @jax.jit
    def make(params):
        delta = lora.lora_transform(params, method, key=jax.random.key(0), **kwargs)[1]
        trains = lora.trainable_mask(delta)
        return jax.tree.map(lambda x, moves: jnp.zeros_like(x) if moves else x, delta, trains)

    return moved(make(params), seed, size)


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    """Leaf by leaf, `atol` relative to each leaf's largest entry."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        largest = max(np.abs(theirs[np.isfinite(theirs)]).max(initial=0), 1e-30)
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol * max(largest, 1e-3))


def assert_same_draws(actual, expected):
    """Equal but for the last bit, which a fused multiply and add may round differently."""
    assert_close(actual, expected, rtol=2e-7, atol=1e-7)
