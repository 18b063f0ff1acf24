"""AdapterFusion: attention over several trained adapters (Pfeiffer et al. 2021,
arXiv:2005.00247)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.layouts import Layout
from lora_jax.methods.bottleneck import BottleneckNode
from lora_jax.methods.method import Method, over_layers
from lora_jax.nodes import DeltaNode
from lora_jax.paths import flatten
from lora_jax.products import AnyWeight, Matmul, Product
from lora_jax.schema import leaf, nested, static
from lora_jax.weights import UNSCALED, linear


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Fusion(Method):
    """`y = sum_n softmax_n(q . k_n) (z_n + h) @ value` over frozen adapters.

    `h = x @ w` is the layer's output, `z_n` what adapter n adds to it, `q = h @ query + query_bias`
    and `k_n = z_n @ key` (equations 3 to 6 of the paper; the values include the skip connection, so
    that with the initial `value`, the identity, they are the output of each adapter alone). A bias
    of the keys would shift all scores equally. Query and key are initialised as normal with
    deviation 0.02. The paper's penalty on `value` is not added.

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

    def init_node(
        self, path: str, weight: AnyWeight, *, layout: Layout, key: jax.Array
    ) -> "FusionNode":
        nodes = self._nodes_at(path, weight)
        widest = max(nodes, key=lambda node: cast(int, node.rank))
        stack, _, d_out = layout.split(weight.shape)
        width, axis = math.prod(d_out), len(stack)
        padded = [node.padded(widest) for node in nodes]

        def init_pair(layer_key):
            return 0.02 * jax.random.normal(layer_key, (2, width, width), jnp.float32)

        pair = over_layers(init_pair, stack)(key)
        identity = jnp.eye(width, dtype=jnp.float32)
        return FusionNode(
            adapters=jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=axis), *padded),
            query=pair[..., 0, :, :],
            query_bias=jnp.zeros((*stack, width), jnp.float32),
            key=pair[..., 1, :, :],
            value=jnp.broadcast_to(identity, (*stack, width, width)),
            layout=layout,
        )

    def _nodes_at(self, path: str, weight: AnyWeight) -> list[BottleneckNode]:
        """The adapters' nodes at one path."""
        found = [nodes.get(path) for nodes in self._nodes()]
        for number, node in enumerate(found):
            if not isinstance(node, BottleneckNode):
                what = "nothing" if node is None else type(node).__name__
                raise ValueError(
                    f"{path}: adapter {number} of the Fusion has {what} here, where another has a "
                    "bottleneck: expected adapters of one base with the same targets."
                )
            structures: Any = jax.tree.structure(node), jax.tree.structure(found[0])
            if structures[0] != structures[1]:
                raise ValueError(
                    "the Fusion's adapters differ in activation, `parallel` or layout: fuse "
                    "adapters that differ in size alone."
                )
            node.check("an adapter of the Fusion", weight)
        return cast(list[BottleneckNode], found)

    def _nodes(self) -> list[dict[str, Any]]:
        def is_node(leaf):
            return isinstance(leaf, DeltaNode)

        return [flatten(delta, is_leaf=is_node) for delta in self.adapters]


@flax.struct.dataclass
class FusionNode(DeltaNode):
    """Frozen adapters of one layer and the attention over them, all float32.

    Attributes:
      adapters: the bottlenecks, with an axis of N adapters after the stack axes.
    """

    own_axes = ("adapter", "width")
    unmerged = "a Fusion attends to its adapters: it has no merged form. Keep it beside."

    adapters: BottleneckNode = nested("stack adapter", trained=False)
    query: jax.Array = leaf("stack width width")
    query_bias: jax.Array = leaf("stack width")
    key: jax.Array = leaf("stack width width")
    value: jax.Array = leaf("stack width width")
    layout: Layout = static(Layout())

    def apply(
        self, product: Product, x: Any, base: AnyWeight, dropout_key: jax.Array | None
    ) -> jax.Array:
        del dropout_key
        h = checkpoint_name(product(x, base), UNSCALED)

        def added_by(adapter: BottleneckNode) -> jax.Array:
            return adapter.mlp(x, product) if adapter.parallel else adapter.mlp(h, Matmul())

        added = jax.vmap(added_by)(self.adapters)  # [N, ..., d_out]
        query = linear(h, self.query.astype(h.dtype))
        query = query + jnp.broadcast_to(self.query_bias.astype(h.dtype), query.shape)
        keys = linear(added, self.key.astype(h.dtype))
        scores = jnp.sum(query[None] * keys, axis=-1, keepdims=True)
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=0).astype(h.dtype)
        return linear(jnp.sum(weights * (added + h[None]), axis=0), self.value.astype(h.dtype))
