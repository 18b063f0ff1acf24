"""Delta nodes: data with named axes, plus what they do to a product.

    y = post(product(pre(x)) + branch(x))

A node declares its leaves with `lora_jax.schema.leaf`. From the names of their axes follow its
check against a base, its reshape to a matrix's node, its sharding, its padding and absence in a
stack, what trains, and its rank.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lora_jax import schema
from lora_jax.adapted import Adapted
from lora_jax.layouts import Layout
from lora_jax.paths import naming
from lora_jax.products import AnyWeight, Product, Rows
from lora_jax.weights import UNSCALED, Shared, dense_float32, is_shared


class DeltaNode:
    """The delta of one weight. Subclasses are `flax.struct.dataclass`es of `leaf`s.

    Every leaf carries the stack axes of the weight first (but those inside `Shared`), so that a
    scan over layers slices node and weight alike; a product sees one layer, of a weight that is a
    matrix.

    Attributes:
      layout: the axes of the weight that the node was made for; a static field of nodes that take
        other weights than matrices.
      dropout: the rate of the branch's input; a static field of nodes that have it.
      own_axes: the names of axes that are not the weight's.
      padded_axes: those along which zeros change nothing, then or later: each factor's gradient
        there is a product with the zeros of the other.
      split_axes: the sides of the matrix, "in" or "out", along which a block of weight and node
        determines its own part of the output.
      part_axes: the sides along which a part of weight and node is that part of the adapted weight.
      takes_experts: whether its matrices meet nothing but `narrow` and `widen`, so that each row
        may have an expert of its own.
      unmerged: why the method cannot be merged; empty where it can.
      statistics: the names of leaves that `after_update` moves.
    """

    layout: Layout = Layout()
    dropout: float = 0.0
    own_axes: ClassVar[tuple[str, ...]] = ()
    padded_axes: ClassVar[tuple[str, ...]] = ()
    split_axes: ClassVar[tuple[str, ...]] = ()
    part_axes: ClassVar[tuple[str, ...]] = ()
    takes_experts: ClassVar[bool] = False
    unmerged: ClassVar[str] = ""
    statistics: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        schema.check_class(cls, cls.own_axes)

    # What the method does to a product.

    def pre(self, x: Any, product: Product) -> Any:
        """What the frozen weight is applied to."""
        del product
        return x

    def branch(self, x: Any, product: Product) -> jax.Array | None:
        """What is added to the frozen weight's output, or None."""
        del x, product
        return None

    def post(self, y: jax.Array) -> jax.Array:
        """The adapted output, of the sum."""
        return y

    def apply(
        self, product: Product, x: Any, base: AnyWeight, dropout_key: jax.Array | None
    ) -> jax.Array:
        """The adapted product of one layer, `post(product(pre(x)) + branch(x))`."""
        y = product(self.pre(x, product), base)
        added = self.branch(product.dropped(x, self.dropout, dropout_key), product)
        y = y if added is None else y + added
        if type(self).post is DeltaNode.post:
            return y
        return self.post(checkpoint_name(y, UNSCALED))

    # Beside a product.

    def factors(self) -> tuple[jax.Array, jax.Array] | None:
        """`a [d_in, r]` and `b [r, d_out]` in float32, of one layer's matrix, where merging adds
        `a @ b` and does nothing else; None otherwise."""
        return None

    def bind(
        self, base: AnyWeight, dropout_key: jax.Array | None, adapter_ids: Shared | None
    ) -> AnyWeight:
        """The bound weight: what the model is given in the place of the base's."""
        return Adapted(base, self, dropout_key, adapter_ids)

    def resolve(self, base: AnyWeight, nodes: Mapping[str, "DeltaNode"]) -> Self:
        """The node with what it shares with other `nodes` of the delta filled in."""
        del base, nodes
        return self

    def merge(self, base: AnyWeight) -> jax.Array:
        """The one dense weight, stacked as `base` is and of its dtype, that does the same: computed
        in float32 and rounded once.

        Raises:
          ValueError: where the method has no merged form.
        """
        self._require_merged_form()
        apply = lambda node, w: node.apply(Rows(), 1.0, w, None)  # noqa: E731
        return self._each_matrix(apply, dense_float32(base)).astype(base.dtype)

    def unmerge(self, merged: jax.Array) -> jax.Array:
        """The base that `merge` made `merged` of, up to the rounding of its dtype.

        Raises:
          ValueError: where `merged` does not determine it.
        """
        self._require_merged_form()
        raise ValueError(f"{type(self).__name__} cannot be unmerged: keep the base.")

    # In training.

    @classmethod
    def penalty(cls, nodes: Sequence[Self]) -> jax.Array | None:
        """What all nodes of this class in a delta add to the mean loss, a scalar; None: nothing."""
        del nodes
        return None

    @classmethod
    def after_update(
        cls, nodes: Sequence[Self], gradients: Sequence[Self], step: jax.Array
    ) -> Sequence[Self]:
        """All nodes of this class in a delta, moved once more after the optimizer.

        Args:
          nodes: as the optimizer left them.
          gradients: of the loss with respect to them before it.
          step: an integer scalar, the number of updates made, from 1.
        """
        del gradients, step
        return nodes

    # What follows from the declared axes.

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The dimensions of each axis, or group of axes, by name."""
        return schema.sizes(self, self.layout)

    @property
    def stack_ndim(self) -> int:
        """How many stack axes the leaves carry."""
        return len(self.sizes().get("stack", ()))

    @property
    def rank(self) -> Any:
        """An int; None for a node without a rank."""
        return next(iter(self.sizes().get("rank", ())), None)

    def check(self, path: str, base: AnyWeight) -> None:
        """Raises ValueError if this node was not made for a weight of this shape."""
        with naming(path):
            ours = self.sizes()
        groups = zip(schema.GROUPS, self.layout.split(base.shape), strict=True)
        made_for = self.layout.joined(*(ours.get(name, theirs) for name, theirs in groups))
        if made_for != tuple(base.shape):
            raise ValueError(
                f"{path}: the delta was made for a weight of shape {made_for}, the base has "
                f"{tuple(base.shape)}. Bind the delta to the base that it was made for."
            )

    def trainable(self) -> Self:
        """The same node with a bool for each leaf: True where an optimizer may move it."""
        return jax.tree.map(lambda leaf: leaf.trained, schema.leaves_of(self))

    def as_matrix(self) -> Self:
        """The node of the weight `[stack..., d_in, d_out]` that `layout` makes of this one's."""
        if self.layout == Layout():
            return self
        matrix: Any = schema.as_matrix(self, self.layout)
        return dataclasses.replace(matrix, layout=Layout())

    def transposed(self) -> Self:
        """The node of the transposed weight, as a tied output head needs it."""
        return schema.transposed(self)

    def local_specs(self, spec: PartitionSpec) -> Self:
        """The same tree with each leaf's spec for a shard_map that splits the matrix
        `[stack..., d_in, d_out]` by `spec`. Raises ValueError where a block does not determine its
        own output."""
        return schema.local_specs(self, spec, self.split_axes)

    def sharding_specs(self, spec: PartitionSpec) -> Self:
        """The same tree with each leaf's sharding spec for `jit`, where the weight has `spec`, with
        an entry for each of its axes. What follows no axis of the weight is replicated."""
        return schema.sharding_specs(self, *self.layout.split_spec(tuple(spec)))

    def matched(self, other: "DeltaNode") -> Self:
        """The same delta with zeros for every optional leaf that only `other` has; exact."""
        if type(self) is not type(other):
            return self
        return schema.filled(self, other, self.layout)

    def padded(self, like: Self) -> Self:
        """The same delta with every leaf grown to the shapes of `like`; exact. See `stack`."""
        node = self.matched(like)
        ours, theirs = node.sizes(), like.sizes()
        odd = {axis for axis in ours if ours[axis] != theirs[axis]}
        if not odd <= set(self.padded_axes):
            raise ValueError(
                f"{type(self).__name__} nodes of different shapes cannot be stacked: they differ "
                f"along {', '.join(sorted(odd))}."
            )
        return schema.padded(node, like, self.layout, self.padded_axes) if odd else node

    def trimmed(self, like: Self) -> Self:
        """What `padded` made of a node of the shapes of `like`, cut back to them."""

        def cut(leaf, wanted):
            return leaf[tuple(slice(size) for size in wanted.shape)]

        return jax.tree.map(cut, schema.without(self, like), like)

    def absent(self) -> Self:
        """A node of these shapes that adapts nothing; `stack` puts it where a delta has none."""
        if not any(jax.tree.leaves(self.trainable())):
            return self  # nothing in it trains: only the nodes of a delta that has it read it
        found = schema.absent(self)
        if found is None:
            raise ValueError(
                f"{type(self).__name__} has no neutral value: stack deltas that target the same "
                "paths."
            )
        return found

    def _require_merged_form(self) -> None:
        if self.unmerged:
            raise ValueError(self.unmerged)

    def _each_matrix(self, change: Callable[[Any, jax.Array], jax.Array], weight: jax.Array):
        """`change(node, matrix)` of each stacked layer in float32, in the layout of `weight`."""
        node: Any = self.as_matrix()
        axes = jax.tree.map(lambda leaf: None if is_shared(leaf) else 0, node, is_leaf=is_shared)
        for _ in range(self.stack_ndim):
            change = jax.vmap(change, in_axes=(axes, 0))
        matrix = self.layout.to_matrix(weight).astype(jnp.float32)
        return self.layout.from_matrix(change(node, matrix), weight.shape)


class Additive(DeltaNode):
    """A node with a branch and nothing else: merged, it is the base plus an update."""

    def update(self, shape: tuple[int, ...]) -> jax.Array:
        """What is added to the weight of this shape, float32."""
        zeros = jnp.zeros(shape, jnp.float32)
        return self._each_matrix(lambda node, _: node.branch(1.0, Rows()), zeros)

    def unmerge(self, merged: jax.Array) -> jax.Array:
        rest = merged.astype(jnp.float32) - self.update(merged.shape)
        return rest.astype(merged.dtype)


class BoundPlain(DeltaNode):
    """A node that is bound as the merged array, since a model may use its leaf in any way."""

    not_by_row: ClassVar[str]  # why `adapter_ids` cannot choose among such nodes

    def bind(
        self, base: AnyWeight, dropout_key: jax.Array | None, adapter_ids: Shared | None
    ) -> AnyWeight:
        del dropout_key
        if adapter_ids is not None:
            raise ValueError(self.not_by_row)
        return self.merge(jax.lax.stop_gradient(base))


class Extra(DeltaNode):
    """A node without a weight: a soft prompt that a model reads, a projection that nodes share.

    `bind` puts those that are `in_weights` into the tree of weights at the node's own path, where
    the base has nothing.
    """

    in_weights: ClassVar[bool] = True

    def bound(self) -> "Extra":
        """What the model reads in the place of this entry."""
        return self

    def apply(self, product, x, base, dropout_key):
        raise ValueError(f"{type(self).__name__} is not a weight: no activation is applied to it.")

    def _require_merged_form(self) -> None:
        raise ValueError(f"{type(self).__name__} has no merged form: it belongs to no weight.")


def rows_behind_layers(node: DeltaNode, layers: int) -> DeltaNode:
    """A node stacked over adapters, `[n, stack...]`, with that axis after the layers' axes."""

    def move(leaf):
        return leaf if is_shared(leaf) else jnp.moveaxis(leaf, 0, layers)

    return jax.tree.map(move, node, is_leaf=is_shared)
