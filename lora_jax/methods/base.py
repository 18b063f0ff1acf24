"""The protocol of a method: what `lora_transform` asks of it, and what its delta nodes can do.

A new method is one file: a frozen dataclass of hyperparameters whose `fresh` makes a node, and the
node, a pytree that applies, merges and says what it trains. Nothing else in the library changes.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lora_jax.layouts import Layout
from lora_jax.weights import Adapted, Shared, Weight, dense, is_shared

AnyWeight = jax.Array | Weight


def require_shape(path: str, made_for: tuple[int, ...], base: AnyWeight) -> None:
    """Raises ValueError unless `base` has the shape that a node at `path` was made for."""
    if tuple(made_for) != tuple(base.shape):
        raise ValueError(
            f"{path}: the delta was made for a weight of shape {tuple(made_for)}, the base has "
            f"{tuple(base.shape)}. Bind the delta to the base that it was made for."
        )


class DeltaNode(abc.ABC):
    """The delta of one weight. Subclasses are `flax.struct.dataclass`es.

    Every leaf carries the stack axes of the weight first (but those inside `Shared`), so that a
    scan over layers slices node and weight alike; `linear` and `embed` see one layer, of a weight
    that is a matrix.

    Attributes:
      layout: the axes of the weight that the node was made for. A node that takes other weights
        than matrices has it as a static field, and defines `as_matrix`.
    """

    layout: Layout = Layout()

    @property
    @abc.abstractmethod
    def stack_ndim(self) -> int:
        """How many stack axes the leaves carry."""

    @abc.abstractmethod
    def linear(self, x: jax.Array, base: AnyWeight, dropout_key: jax.Array | None) -> jax.Array:
        """The adapted layer's output `[..., d_out]` for `x [..., d_in]` and the frozen weight."""

    @abc.abstractmethod
    def merge(self, base: AnyWeight) -> jax.Array:
        """The one dense weight, stacked as `base` is, that does the same. Raises ValueError where
        the method has no merged form."""

    @abc.abstractmethod
    def unmerge(self, merged: jax.Array) -> jax.Array:
        """The base that `merge` made `merged` of, up to the rounding of its dtype. Raises
        ValueError where the merged form does not tell it."""

    @abc.abstractmethod
    def trainable(self) -> Self:
        """The same node with a bool for each leaf: True where an optimizer may move it."""

    def check(self, path: str, base: AnyWeight) -> None:
        """Raises ValueError if this node was not made for a weight of this shape."""
        del path, base

    def embed(self, tokens: jax.Array, base: AnyWeight) -> jax.Array:
        """The adapted table's rows. Raises ValueError where the method cannot adapt a table."""
        raise ValueError(f"{type(self).__name__} cannot adapt an embedding: leave it out (None).")

    def transposed(self) -> Self:
        """The node of the transposed weight, as a tied output head needs it."""
        raise ValueError(f"{type(self).__name__} cannot adapt a tied embedding: leave it out.")

    def as_matrix(self) -> Self:
        """The node of the weight `[stack..., d_in, d_out]` that `layout` makes of this one's."""
        if self.layout != Layout():
            raise ValueError(
                f"{type(self).__name__} adapts matrices, not weights of {self.layout}."
            )
        return self

    def partition(self, spec: PartitionSpec) -> Self:
        """The same tree with the partition spec of each leaf, for a weight `[stack..., d_in,
        d_out]` that is split by `spec`. Raises ValueError where a block of the weight does not
        tell its own output."""
        *stack, d_in, d_out = spec
        if d_in is not None or d_out is not None:
            raise ValueError(
                f"{type(self).__name__} needs whole matrices: split none of the matrix's own axes."
            )
        return self._partitioned(PartitionSpec(*stack))

    def placement(self, spec: PartitionSpec) -> Self:
        """The same tree with the partition spec of each leaf on a mesh where the weight lies by
        `spec`, with an entry for each of its axes. What follows no axis of the weight lies whole on
        every device."""
        stack, _, _ = self.layout.split(tuple(spec))
        return self._partitioned(PartitionSpec(*stack))

    def _partitioned(self, spec: PartitionSpec) -> Self:
        def split(leaf):
            return Shared(PartitionSpec()) if is_shared(leaf) else spec

        return jax.tree.map(split, self, is_leaf=is_shared)

    def resolve(self, extras: Mapping[str, "Extra"]) -> Self:
        """The node with what it shares with others, stored once at the delta's root, filled in."""
        del extras
        return self

    def bind(
        self, base: AnyWeight, dropout_key: jax.Array | None, adapter_ids: Shared | None
    ) -> AnyWeight:
        """What stands in the weight's place while the model runs."""
        return Adapted(base, self, dropout_key, adapter_ids)

    def matched(self, other: "DeltaNode") -> Self:
        """The same delta with every optional leaf that `other` has, where that is exact."""
        del other
        return self

    def padded(self, like: Self) -> Self:
        """The same delta with every leaf grown to the shapes of `like`; exact. See `stack`."""
        fits = jax.tree.map(lambda ours, other: ours.shape == other.shape, self, like)
        if not all(jax.tree.leaves(fits)):
            raise ValueError(f"{type(self).__name__} nodes of different shapes cannot be stacked.")
        return self

    def trimmed(self, like: Self) -> Self:
        """What `padded` made of a node of the shapes of `like`, cut back to them."""

        def cut(leaf, wanted):
            return leaf[tuple(slice(size) for size in wanted.shape)]

        return jax.tree.map(cut, self, like)

    def absent(self) -> Self:
        """A node of these shapes that adapts nothing; `stack` puts it where a delta has none."""
        raise ValueError(
            f"{type(self).__name__} has no neutral value: stack deltas that target the same paths."
        )

    @property
    def rank(self) -> int | None:
        """The rank, where the word has a meaning."""
        return None


class Additive(DeltaNode):
    """A node whose merged form is the base plus an update."""

    @abc.abstractmethod
    def update(self, shape: tuple[int, ...]) -> jax.Array:
        """What is added to the weight, float32, in the weight's own shape."""

    def merge(self, base: AnyWeight) -> jax.Array:
        total = dense(base).astype(jnp.float32) + self.update(base.shape)
        return total.astype(base.dtype)

    def unmerge(self, merged: jax.Array) -> jax.Array:
        rest = merged.astype(jnp.float32) - self.update(merged.shape)
        return rest.astype(merged.dtype)


class Extra(DeltaNode):
    """A node without a weight: a soft prompt that a model reads, a projection that nodes share.

    `bind` puts those that are `in_weights` into the tree of weights at the node's own path, where
    the base has nothing.
    """

    in_weights: ClassVar[bool] = True

    @property
    def stack_ndim(self) -> int:
        return 0

    def bound(self) -> "Extra":
        """What the model reads in this entry's place."""
        return self

    def linear(self, x, base, dropout_key):
        raise ValueError(f"{type(self).__name__} is not a weight: no activation is applied to it.")

    def merge(self, base):
        raise ValueError(f"{type(self).__name__} has no merged form: it belongs to no weight.")

    def unmerge(self, merged):
        raise ValueError(f"{type(self).__name__} has no merged form: it belongs to no weight.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """Hyperparameters of one way to adapt a weight."""

    needs_matrix: ClassVar[bool] = True  # whether only leaves of two axes or more are adapted

    def accepts(self, path: str, weight: AnyWeight, layout: Layout | None) -> bool:
        """Whether the leaf at `path` is one that this method can adapt; `layout` is None for one
        that is no matrix."""
        del path, weight
        return not self.needs_matrix or layout is not None

    @property
    def reads_values(self) -> bool:
        """Whether a fresh node depends on the weight's values; of an abstract weight it is then
        abstract itself."""
        return False

    def at(self, path: str) -> "Method":
        """The method of one path; what `fresh` is asked of."""
        del path
        return self

    @abc.abstractmethod
    def fresh(self, weight: AnyWeight, *, layout: Layout, key: jax.Array) -> DeltaNode | None:
        """A fresh node for `weight`, which leaves the layer's output unchanged; None for a method
        that leaves all weights alone and has `extras` only.

        Args:
          weight: the frozen weight, possibly abstract, `[stack..., contracted..., output...]`.
          layout: its axes.
          key: one typed key for each stacked layer, `[stack...]`.
        """

    def extras(
        self, weights: Mapping[str, AnyWeight], *, layouts: Mapping[str, Layout], key: jax.Array
    ) -> dict[str, Extra]:
        """Further entries `{path: Extra}` of the delta: what the nodes of this method share, or
        parameters that a model reads by itself.

        Args:
          weights: `{path: weight}` of all that this method was targeted at.
          layouts: their axes, and maybe others', by path.
          key: the key that `lora_transform` was given.
        """
        del weights, layouts, key
        return {}


def of_values(method: Method, make: Callable[[Any], Any], weights: Any) -> Any:
    """`make(weights)`, or its shapes, where it reads the values of weights that are abstract."""
    leaves = jax.tree.leaves(weights)
    is_abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    if method.reads_values and is_abstract:
        return jax.eval_shape(make, weights)
    return make(weights)
