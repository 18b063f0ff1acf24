"""Applies a weight along the axes that a program's own product names."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lora_jax.adapted import Adapted
from lora_jax.tracing.modified import Modified
from lora_jax.tracing.parts import Taken
from lora_jax.weights import (
    Weight,
    dense,
    dense_float32,
    embed,
    is_shared,
    linear,
    transpose,
)


@flax.struct.dataclass
class AsTraced(Weight):
    """A matrix that is multiplied as the program's own `dot_general` would.

    Attributes:
      matrix: `[d_in, d_out]`, or `[d_out, d_in]` where `flipped`.
      operand_dtype: of the program's activation; integers, which are exact, keep their dtype.
      precision: the program's.
      result_dtype: of the program's product.
    """

    matrix: jax.Array | Weight
    operand_dtype: Any = flax.struct.field(pytree_node=False)
    precision: Any = flax.struct.field(pytree_node=False)
    result_dtype: Any = flax.struct.field(pytree_node=False)
    flipped: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.matrix.shape)
        return (*shape[:-2], shape[-1], shape[-2]) if self.flipped else shape

    @property
    def dtype(self) -> Any:
        return self.matrix.dtype

    @property
    def T(self) -> "AsTraced":  # noqa: N802
        return dataclasses.replace(self, flipped=not self.flipped)

    def _oriented(self) -> jax.Array | Weight:
        return transpose(self.matrix) if self.flipped else self.matrix

    def linear(self, x: jax.Array) -> jax.Array:
        if jnp.issubdtype(self.operand_dtype, jnp.floating):
            x = x.astype(self.operand_dtype)
        if isinstance(self.matrix, Weight):
            return linear(x, self._oriented()).astype(self.result_dtype)
        return jax.lax.dot_general(
            x,
            self.matrix,
            (((x.ndim - 1,), (1 if self.flipped else 0,)), ((), ())),
            precision=self.precision,
            preferred_element_type=self.result_dtype,
        )

    def embed(self, tokens: jax.Array) -> jax.Array:
        return embed(tokens, self._oriented())

    def dense(self) -> jax.Array:
        return dense(self._oriented())

    def dense_float32(self) -> jax.Array:
        return dense_float32(self._oriented())


def as_traced(weight: Weight, operand_dtype: Any, precision: Any, result_dtype: Any) -> Weight:
    """The weight with its frozen part wrapped in `AsTraced`."""

    def wrap(frozen):
        return AsTraced(frozen, operand_dtype, precision, result_dtype)

    if isinstance(weight, Modified | Taken):
        inner = as_traced(weight.weight, operand_dtype, precision, result_dtype)
        return dataclasses.replace(weight, weight=inner)
    if isinstance(weight, Adapted):
        return dataclasses.replace(weight, base=wrap(weight.base))
    return wrap(weight)


def over_stack(apply: Callable, weight: Weight, x: jax.Array, along: Sequence[bool]) -> jax.Array:
    """`apply(layer, x)` for every layer of a stacked weight, stacked in front.

    Args:
      apply: takes an unstacked weight and `x`.
      weight: with as many stack axes as `along` is long.
      x: with an axis in front for each True in `along`, which runs along that stack axis.
    """
    leaves, treedef = jax.tree.flatten(weight, is_leaf=is_shared)
    sliced = [None if is_shared(leaf) else leaf for leaf in leaves]

    def run(sliced, x):
        layer = [w if s is None else s for s, w in zip(sliced, leaves, strict=True)]
        return apply(treedef.unflatten(layer), x)

    for mapped in reversed(along):
        run = jax.vmap(run, in_axes=(0, 0 if mapped else None))
    return run(sliced, x)


def arranged(x: jax.Array, labels: Sequence[Any], order: Sequence[Any]) -> jax.Array:
    """`x`, whose axes are called `labels`, with its axes in this order; the others, of size 1, are
    dropped."""
    places = [labels.index(label) for label in order]
    rest = [i for i in range(x.ndim) if i not in places]
    moved = jnp.transpose(x, [*places, *rest])
    return moved.reshape(moved.shape[: len(order)])
