"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353)."""

import dataclasses
from typing import Any, Self, cast

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lora_jax.layouts import Layout
from lora_jax.methods.base import AnyWeight, DeltaNode
from lora_jax.methods.branches import drop
from lora_jax.methods.decompositions import each_layer
from lora_jax.methods.lora import LoRA, LowRank
from lora_jax.weights import UNSCALED, as_matrix, dense, linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """`y = c * (x @ V)` with `V = w + scale * a @ b` and `c = m / ||V||`, column by column.

    The magnitude `m` trains, and starts as `||V||`; the norm is treated as a constant (section 4.3
    of the paper). It is never taken of V itself, but expanded:
    `||V_j||^2 = ||w_j||^2 + 2 s (a^T w)_j . b_j + s^2 b_j^T (a^T a) b_j`, where the first term is
    stored and the second costs what r more tokens cost.

    With dropout, `y = x @ w + (c - 1) * (x_d @ w) + c * scale * x_d @ a @ b` for the dropped input
    `x_d`, as PEFT has it: a second product with the base.

    Attributes are those of `LoRA`.

    Raises:
      ValueError: as `LoRA`, and for an init that changes the base.
    """

    def __post_init__(self):
        super().__post_init__()
        if self._decomposes:
            raise ValueError(f"{self._named('init')}: expected one of kaiming, gaussian.")

    @property
    def reads_values(self) -> bool:
        return True

    def fresh(self, weight: AnyWeight, *, layout: Layout, key: jax.Array) -> DeltaNode:
        low = self.low_rank(weight, layout=layout, key=key)
        square = each_layer(_column_squares, as_matrix(weight, layout))
        square = square.reshape(low.b.shape[: low.stack_ndim] + low.b.shape[low.stack_ndim + 1 :])
        return DecomposedLowRank(low=low, magnitude=jnp.sqrt(square), base_square=square)


@flax.struct.dataclass
class DecomposedLowRank(DeltaNode):
    """Columns of `w + scale * a @ b`, each rescaled to a trained length.

    Attributes:
      low: the factors.
      magnitude: `m [stack..., output...]`, the length of each column.
      base_square: `[stack..., output...]`, the squared length of each column of the base; frozen.
    """

    low: LowRank
    magnitude: jax.Array
    base_square: jax.Array

    @property
    def layout(self) -> Layout:  # type: ignore[override]
        return self.low.layout

    @property
    def rank(self) -> int:
        return self.low.rank

    @property
    def stack_ndim(self) -> int:
        return self.low.stack_ndim

    def linear(self, x: jax.Array, base: AnyWeight, dropout_key: jax.Array | None) -> jax.Array:
        factor = self._factor(linear(self.low.a.T.astype(x.dtype), base))
        y = linear(x, base)
        if dropout_key is None or self.low.dropout == 0:
            return _scaled(checkpoint_name(y + self.low.branch(x), UNSCALED), factor)
        x = drop(x, self.low.dropout, dropout_key)
        wide = checkpoint_name(linear(x, base), UNSCALED)
        return y + _scaled(wide, factor - 1) + _scaled(self.low.branch(x), factor)

    def embed(self, tokens: jax.Array, base: AnyWeight) -> jax.Array:
        rows = self.low.embed(tokens, base)
        return _scaled(rows, self._factor(linear(self.low.a.T.astype(rows.dtype), base)))

    def merge(self, base: AnyWeight) -> jax.Array:
        node, matrix = self.as_matrix(), self._dense_matrix(base)
        total = matrix + node.low.update(matrix.shape)
        merged = total * node._factor(node._inner(matrix))[..., None, :]
        return self.low.layout.from_matrix(merged, base.shape).astype(base.dtype)

    def unmerge(self, merged: jax.Array) -> jax.Array:
        """Solves for the length n of each column of V: `||n d - u||^2 = ||w||^2`, with d the merged
        column over its magnitude and u its update. A column whose update is longer than itself is
        not determined, and becomes NaN."""
        node, matrix = self.as_matrix(), self._dense_matrix(merged)
        update = node.low.update(matrix.shape)
        direction = matrix / node.magnitude[..., None, :]
        along = jnp.sum(direction * update, axis=-2)
        rest = node.base_square - jnp.sum(update**2, axis=-2)
        length = along + jnp.sqrt(along**2 + jnp.where(rest >= 0, rest, jnp.nan))
        base = length[..., None, :] * direction - update
        return self.low.layout.from_matrix(base, merged.shape).astype(merged.dtype)

    def as_matrix(self) -> "DecomposedLowRank":
        stack = self.magnitude.shape[: self.stack_ndim]
        return dataclasses.replace(
            self,
            low=self.low.as_matrix(),
            magnitude=self.magnitude.reshape(*stack, -1),
            base_square=self.base_square.reshape(*stack, -1),
        )

    def placement(self, spec: PartitionSpec) -> "DecomposedLowRank":
        stack, _, d_out = self.layout.split(tuple(spec))
        columns: Any = PartitionSpec(*stack, *d_out)
        low = self.low.placement(spec)
        return dataclasses.replace(self, low=low, magnitude=columns, base_square=columns)

    def trainable(self) -> Self:
        low = self.low.trainable()
        return dataclasses.replace(cast(Any, self), low=low, magnitude=True, base_square=False)

    def check(self, path: str, base: AnyWeight) -> None:
        self.low.check(path, base)

    def padded(self, like: "DecomposedLowRank") -> "DecomposedLowRank":
        return dataclasses.replace(self, low=self.low.padded(like.low))

    def absent(self) -> "DecomposedLowRank":
        return dataclasses.replace(
            self, low=self.low.absent(), magnitude=jnp.sqrt(self.base_square)
        )

    def _dense_matrix(self, weight: AnyWeight) -> jax.Array:
        return self.low.layout.to_matrix(dense(weight)).astype(jnp.float32)

    def _inner(self, matrix: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return jnp.matmul(jnp.swapaxes(self.low.a, -1, -2), matrix)

    def _factor(self, inner: jax.Array) -> jax.Array:
        """`m / ||V||`, `[..., d_out]`, for `inner = a^T w [..., r, d_out]`."""
        a, b, scale = self.low.a, self.low.b, self.low.scale[..., None, None]
        with jax.default_matmul_precision("highest"):
            squared = jnp.matmul(jnp.matmul(jnp.swapaxes(a, -1, -2), a), b) * scale**2
        cross = 2 * scale * inner.astype(jnp.float32) + squared
        square = self.base_square + jnp.sum(b * cross, axis=-2)
        norm = jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))  # a column may be zero
        factor = self.magnitude / jax.lax.stop_gradient(norm)
        # A node of scale 0 stands, in a stack, for a target that a member does not have.
        return jnp.where(self.low.scale[..., None] == 0, jnp.ones_like(factor), factor)


def _scaled(y: jax.Array, factor: jax.Array) -> jax.Array:
    """`y * factor` over the last axis, in float32 and rounded once."""
    product = y.astype(jnp.float32) * jnp.broadcast_to(factor, y.shape)
    return product.astype(y.dtype)


def _column_squares(matrix: jax.Array) -> jax.Array:
    return jnp.sum(matrix**2, axis=-2)
