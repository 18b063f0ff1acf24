"""AdapterFusion: attention over several trained adapters (Pfeiffer et al. 2021,
arXiv:2005.00247)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.layouts import Layout
from lora_jax.methods.base import AnyWeight, DeltaNode, Method
from lora_jax.methods.bottleneck import Behind
from lora_jax.paths import flatten
from lora_jax.weights import UNSCALED, linear


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Fusion(Method):
    """`y = sum_n softmax_n(q . k_n) (z_n + h) @ value` over adapters that stay as they are.

    `h = x @ w` is the layer's output, `z_n` what adapter n adds to it, `q = h @ query + query_bias`
    and `k_n = z_n @ key` (equations 3 to 6 of the paper; the values hold the skip connection, so
    that they start, with `value` the identity, as what each adapter alone gives). A bias of the
    keys would shift all scores alike. Query and key start normal of deviation 0.02. The paper's
    penalty on `value` is not added.

    Attributes:
      adapters: deltas of `Bottleneck` over one base and the same targets, which are the targets of
        the fusion too; sizes may differ.

    Raises:
      ValueError: for fewer than two adapters; where one lacks a path or was made for another base.
    """

    adapters: Sequence[Mapping[str, Any]]

    def __post_init__(self):
        if len(self.adapters) < 2:
            raise ValueError(f"Fusion of {len(self.adapters)} adapters: expected two or more.")

    def accepts(self, path: str, weight: AnyWeight, layout: Layout | None) -> bool:
        del weight, layout
        return any(path in nodes for nodes in self._nodes())

    def at(self, path: str) -> "FusionAt":
        members = [nodes.get(path) for nodes in self._nodes()]
        for number, member in enumerate(members):
            if not isinstance(member, Behind):
                found = "nothing" if member is None else type(member).__name__
                raise ValueError(
                    f"{path}: adapter {number} of the Fusion has {found} here, where another has a "
                    "bottleneck: expected adapters of one base with the same targets."
                )
        return FusionAt(path=path, members=tuple(cast(list[Behind], members)))

    def fresh(self, weight: AnyWeight, *, layout: Layout, key: jax.Array) -> "Fused":
        raise AssertionError("a Fusion is specialised to a path first")

    def _nodes(self) -> list[dict[str, Any]]:
        def is_node(leaf):
            return isinstance(leaf, DeltaNode)

        return [flatten(delta, is_leaf=is_node) for delta in self.adapters]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FusionAt(Method):
    """The `Fusion` of one weight's adapters."""

    path: str
    members: tuple[Behind, ...]

    def fresh(self, weight: AnyWeight, *, layout: Layout, key: jax.Array) -> "Fused":
        widest = max(self.members, key=lambda member: member.rank)
        structure: Any = jax.tree.structure(widest)
        for member in self.members:
            if structure != jax.tree.structure(member):
                raise ValueError(
                    "the Fusion's adapters differ in activation, placement or layout: fuse "
                    "adapters that differ in size alone."
                )
            member.check("an adapter of the Fusion", weight)
        stack, _, d_out = layout.split(weight.shape)
        width = math.prod(d_out)
        axis = len(stack)
        padded = [member.padded(widest) for member in self.members]

        def draw(layer_key):
            return 0.02 * jax.random.normal(layer_key, (2, width, width), jnp.float32)

        for _ in stack:
            draw = jax.vmap(draw)
        pair = draw(key)
        identity = jnp.eye(width, dtype=jnp.float32)
        return Fused(
            adapters=jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=axis), *padded),
            query=pair[..., 0, :, :],
            query_bias=jnp.zeros((*stack, width), jnp.float32),
            key=pair[..., 1, :, :],
            value=jnp.broadcast_to(identity, (*stack, width, width)),
        )


@flax.struct.dataclass
class Fused(DeltaNode):
    """Frozen adapters of one layer and the attention over them, all float32.

    Attributes:
      adapters: the bottlenecks, with an axis for the N of them behind the stack axes.
      query, key, value: `[stack..., d_out, d_out]`.
      query_bias: `[stack..., d_out]`.
    """

    adapters: Behind
    query: jax.Array
    query_bias: jax.Array
    key: jax.Array
    value: jax.Array

    @property
    def stack_ndim(self) -> int:
        return self.query.ndim - 2

    def linear(self, x: jax.Array, base: AnyWeight, dropout_key: jax.Array | None) -> jax.Array:
        del dropout_key
        h = checkpoint_name(linear(x, base), UNSCALED)
        added = jax.vmap(lambda adapter: adapter.branch(x, h))(self.adapters)  # [N, ..., d_out]

        query = linear(h, self.query.astype(x.dtype))
        query = query + jnp.broadcast_to(self.query_bias.astype(x.dtype), query.shape)
        keys = linear(added, self.key.astype(x.dtype))
        scores = jnp.sum(query[None] * keys, axis=-1, keepdims=True)
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=0).astype(x.dtype)
        return linear(jnp.sum(weights * (added + h[None]), axis=0), self.value.astype(x.dtype))

    def merge(self, base: AnyWeight) -> jax.Array:
        raise ValueError("a Fusion attends to its adapters: it has no merged form. Keep it beside.")

    def unmerge(self, merged: jax.Array) -> jax.Array:
        return self.merge(merged)

    def as_matrix(self) -> "Fused":
        return dataclasses.replace(self, adapters=self._each_adapter(Behind.as_matrix))

    def trainable(self) -> Self:
        every = jax.tree.map(lambda _: True, self)
        frozen = jax.tree.map(lambda _: False, self.adapters)
        return dataclasses.replace(cast(Any, every), adapters=frozen)

    def check(self, path: str, base: AnyWeight) -> None:
        axis = self.stack_ndim
        jax.tree.map(lambda leaf: jnp.take(leaf, 0, axis=axis), self.adapters).check(path, base)

    def _each_adapter(self, change) -> Behind:
        return jax.vmap(change, in_axes=self.stack_ndim, out_axes=self.stack_ndim)(self.adapters)
