"""A weight that the program has multiplied along one side, or filled out of bounds."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lora_jax.products import scaled
from lora_jax.weights import (
    Weight,
    cast,
    dense,
    dense_float32,
    embed,
    linear,
    through,
    transpose,
)


@flax.struct.dataclass
class Modified(Weight):
    """`diag(rows) @ W @ diag(columns)`, or `fill` in every entry of the layers not `present`.

    Attributes:
      weight: `[stack..., d_in, d_out]`.
      rows: None, or `[stack..., d_in]`.
      columns: None, or `[stack..., d_out]`.
      present: None, or bool `[stack...]`.
      fill: a number.
    """

    weight: Any
    rows: jax.Array | None = None
    columns: jax.Array | None = None
    present: jax.Array | None = None
    fill: float = flax.struct.field(pytree_node=False, default=0.0)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    @property
    def T(self) -> "Modified":  # noqa: N802
        return dataclasses.replace(
            self, weight=transpose(self.weight), rows=self.columns, columns=self.rows
        )

    def linear(self, x: jax.Array) -> jax.Array:
        y = self._output(linear(x if self.rows is None else scaled(x, self.rows), self.weight))
        if self.present is None:
            return y
        absent = jnp.where(self.present, jnp.zeros_like(x), x)  # or 0 * NaN in the gradient
        filled = jnp.sum(absent, axis=-1, keepdims=True) * jnp.asarray(self.fill, x.dtype)
        return jnp.where(self.present, y, jnp.broadcast_to(filled.astype(y.dtype), y.shape))

    def through(self, product: Any, x: jax.Array) -> jax.Array:
        if self.present is not None:
            raise ValueError("kernels that are filled out of bounds cannot be applied.")
        x = x if self.rows is None else product.scale(x, self.rows)
        return self._output(through(product, x, self.weight))

    def embed(self, tokens: jax.Array) -> jax.Array:
        y = embed(tokens, self.weight)
        if self.rows is not None:
            y = scaled(y, self.rows[tokens][..., None])
        return self._filled(self._output(y))

    def dense(self) -> jax.Array:
        return self._entries(dense(self.weight))

    def dense_float32(self) -> jax.Array:
        return self._entries(dense_float32(self.weight))

    def cast(self, dtype: Any) -> "Modified":
        return dataclasses.replace(self, weight=cast(self.weight, dtype))

    def local_specs(self, spec: PartitionSpec) -> "Modified":
        *stack, d_in, d_out = spec
        weight = self.weight.local_specs(spec) if isinstance(self.weight, Weight) else spec

        def of(vector, *entries):
            return None if vector is None else PartitionSpec(*stack, *entries)

        return dataclasses.replace(
            self,
            weight=weight,
            rows=of(self.rows, d_in),
            columns=of(self.columns, d_out),
            present=of(self.present),
        )

    def _output(self, y: jax.Array) -> jax.Array:
        return y if self.columns is None else scaled(y, self.columns)

    def _entries(self, matrix: jax.Array) -> jax.Array:
        if self.rows is not None:
            matrix = matrix * self.rows[..., None].astype(matrix.dtype)
        if self.columns is not None:
            matrix = matrix * self.columns[..., None, :].astype(matrix.dtype)
        return self._filled(matrix)

    def _filled(self, y: jax.Array) -> jax.Array:
        if self.present is None:
            return y
        present = self.present.reshape(*self.present.shape, *[1] * (y.ndim - self.present.ndim))
        return jnp.where(present, y, jnp.asarray(self.fill, y.dtype))
