"""A model as a function from weights and tokens to logits, with its limits."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lora_jax import paths
from lora_jax.layouts import Layout
from lora_jax.models import decoder
from lora_jax.models.config import DecoderConfig
from lora_jax.models.leading import leading
from lora_jax.quant import Quantized
from lora_jax.targets import guessed_layout
from lora_jax.weights import PyTree, Transposed, Weight, as_matrix, dense, embed, is_weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forward:
    """Any model, run unchanged.

    Attributes:
      apply: `(weights, tokens [B, T]) -> logits [B, T, V]`; `adapt(fn)` for a model that knows
        nothing of adapted weights. Equal functions share their compiled programs.
      vocab_size: V.
      context_length: the most tokens that it reads, where there is a limit.
    """

    apply: Callable[[PyTree, jax.Array], jax.Array]
    vocab_size: int
    context_length: int | None = None

    def logits(self, weights: PyTree, tokens: jax.Array) -> jax.Array:
        return self.apply(weights, tokens)

    def prepared(self, params: PyTree) -> PyTree:
        """The params that this model runs on."""
        return params

    def room(self, weights: PyTree) -> int | None:
        """How many tokens it reads at most."""
        del weights
        return self.context_length


@dataclasses.dataclass(frozen=True)
class ModelForward:
    """One of our models, run with float32 activations whatever the dtype of its weights, so that
    what a bfloat16 and a float32 copy of one checkpoint compute can be compared."""

    config: DecoderConfig

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def logits(self, weights: PyTree, tokens: jax.Array) -> jax.Array:
        return decoder.forward(weights, tokens, self.config)

    def prepared(self, params: PyTree) -> PyTree:
        return in_float32(params)

    def room(self, weights: PyTree) -> int | None:
        return self.config.context_length - sum(leading(weights, self.config))


AnyForward = Forward | ModelForward


def in_float32(params: PyTree) -> PyTree:
    """The same values as float32 weights. A matrix is cast where an activation meets it, layer by
    layer; scales and biases at once."""

    def wide(path: str, leaf: Any) -> Any:
        if isinstance(leaf, Quantized):
            return dataclasses.replace(leaf, dense_dtype=jnp.dtype(jnp.float32))
        if is_weight(leaf):
            return InFloat32(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype == jnp.float32:
            return leaf
        is_matrix = guessed_layout(path, leaf) is not None
        return InFloat32(leaf) if is_matrix else leaf.astype(jnp.float32)

    flat = paths.flatten(params, is_leaf=is_weight)
    leaves = [wide(path, leaf) for path, leaf in flat.items()]
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_weight), leaves)


@flax.struct.dataclass
class InFloat32(Weight):
    """A weight of another dtype as the float32 weight of the same values."""

    weight: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        return jnp.dtype(jnp.float32)

    @property
    def layout(self) -> Layout:
        return self.weight.layout if is_weight(self.weight) else Layout()

    @property
    def T(self) -> Transposed:  # noqa: N802
        return Transposed(self)

    def as_matrix(self, layout: Layout) -> "InFloat32":
        return InFloat32(as_matrix(self.weight, layout))

    def linear(self, x: jax.Array) -> jax.Array:
        return self.weight.linear(x) if is_weight(self.weight) else jnp.matmul(x, self.dense())

    def embed(self, tokens: jax.Array) -> jax.Array:
        return embed(tokens, self.weight).astype(jnp.float32)

    def dense(self) -> jax.Array:
        return dense(self.weight).astype(jnp.float32)
