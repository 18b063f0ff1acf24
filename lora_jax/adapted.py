"""A frozen weight bound to its delta node: what a model multiplies with."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lora_jax.layouts import Layout
from lora_jax.node_parts import by_rows
from lora_jax.products import Lookup, Matmul, Product
from lora_jax.weights import Shared, Weight, as_matrix, cast, dense_float32, transpose


@flax.struct.dataclass
class Adapted(Weight):
    """What `bind` puts in the place of an adapted leaf.

    Attributes:
      base: the frozen weight, an array or a quantised `Weight`.
      node: the delta node that says what is done to a product with it.
      dropout_key: None, or one typed key for each stacked layer `[stack...]`.
      adapter_ids: None, or `Shared` ids `[batch]` that pick each batch row's adapter; the node's
        leaves then carry the axis of adapters right behind their stack axes.
    """

    base: jax.Array | Weight
    node: Any
    dropout_key: jax.Array | None = None
    adapter_ids: Shared | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def layout(self) -> Layout:
        return self.node.layout

    def local_specs(self, spec: PartitionSpec) -> "Adapted":
        stack: Any = PartitionSpec(*spec[:-2])
        base: Any = self.base.local_specs(spec) if isinstance(self.base, Weight) else spec
        return dataclasses.replace(
            self,
            base=base,
            node=self.node.local_specs(spec),
            dropout_key=stack if self.dropout_key is not None else None,
            adapter_ids=None if self.adapter_ids is None else Shared(PartitionSpec()),
        )

    def as_matrix(self, layout: Layout) -> "Adapted":
        return dataclasses.replace(
            self, base=as_matrix(self.base, layout), node=self.node.as_matrix()
        )

    def for_part(self, index: jax.Array) -> "Adapted":
        if self.dropout_key is None:
            return self
        return dataclasses.replace(self, dropout_key=jax.random.fold_in(self.dropout_key, index))

    def cast(self, dtype: Any) -> "Adapted":
        return dataclasses.replace(self, base=cast(self.base, dtype))

    @property
    def T(self) -> "Adapted":  # noqa: N802
        return dataclasses.replace(self, base=transpose(self.base), node=self.node.transposed())

    def through(self, product: Product, x: jax.Array) -> jax.Array:
        return self._each_row(lambda node, x, key: node.apply(product, x, self.base, key), x)

    def by_rows(self, experts: jax.Array) -> "Adapted":
        """The weight `[g, d_in, d_out]` for the product `Experts`, whose rows have `experts [m]`.

        Raises:
          ValueError: for a method without a form for it, or adapters by batch row.
        """
        if not self.node.takes_experts or self.adapter_ids is not None:
            ids = " with adapter_ids" if self.adapter_ids is not None else ""
            raise ValueError(
                f"{type(self.node).__name__}{ids} has no form for experts whose rows are told by "
                "group sizes. Adapt them with LoRA, VeRA, AdaLoRA or IA3."
            )
        key = None if self.dropout_key is None else self.dropout_key[0]
        return dataclasses.replace(self, node=by_rows(self.node, experts), dropout_key=key)

    def linear(self, x: jax.Array) -> jax.Array:
        return self.through(Matmul(), x)

    def embed(self, tokens: jax.Array) -> jax.Array:
        return self.through(Lookup(self.dtype), tokens)

    def dense(self) -> jax.Array:
        return self.dense_float32().astype(self.dtype)

    def dense_float32(self) -> jax.Array:
        if self.adapter_ids is not None:
            raise ValueError(
                "a weight whose batch rows use different adapters has no single dense form: "
                "bind one adapter, without adapter_ids."
            )
        return self.node.merge(dense_float32(self.base))

    def _each_row(self, apply: Callable, x: jax.Array) -> jax.Array:
        if self.adapter_ids is None:
            return apply(self.node, x, self.dropout_key)
        ids, key = self.adapter_ids.value, self.dropout_key
        rows = jax.tree.map(lambda leaf: leaf[ids], self.node)
        each = jax.vmap(jax.random.fold_in, (None, 0))
        keys = None if key is None else each(key, jnp.arange(ids.shape[0]))
        return jax.vmap(apply, in_axes=(0, 0, None if key is None else 0))(rows, x, keys)
