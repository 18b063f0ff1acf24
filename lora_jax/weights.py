"""The seam: `linear` and `embed` are the only places where a weight meets an activation.

A *weight* is a `jax.Array` or a `Weight`: a pytree that stands where an array stood, knows its
logical shape, and applies itself. Quantised formats and adapted weights are such pytrees, so that
a model written with `linear` and `embed` takes them all without knowing any.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lora_jax.layouts import Layout

PyTree = Any

# The name, for rematerialisation policies, of what an adapter computes on a narrow axis: a model
# that keeps it spares the backward pass a product for a few bytes.
NARROW = "adapter_narrow"
# And of a layer's output before an adapter scales it: the gradient of the scale wants it again.
UNSCALED = "adapter_unscaled"


class Weight(abc.ABC):
    """What may stand in a params tree instead of an array. Subclasses are registered pytrees."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The logical shape, `[stack..., d_in, d_out]`."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """The dtype of the dense weight that this stands for."""

    @abc.abstractmethod
    def linear(self, x: jax.Array) -> jax.Array:
        """`x @ W` for `x [..., d_in]` and one unstacked weight."""

    @abc.abstractmethod
    def embed(self, tokens: jax.Array) -> jax.Array:
        """`W[tokens]`."""

    @abc.abstractmethod
    def dense(self) -> jax.Array:
        """The plain array; builds it."""

    def requantized(self, dense: jax.Array) -> "Weight":
        """Another dense weight of this shape in this one's format."""
        del dense
        raise ValueError(f"{type(self).__name__} has no way to quantise a dense weight again.")

    @property
    @abc.abstractmethod
    def T(self) -> "Weight | jax.Array":  # noqa: N802 - as on arrays
        """The weight of the transposed matrix, as a tied output head needs it."""

    def linear_transposed(self, x: jax.Array) -> jax.Array:
        """`x @ W.T` for `x [..., d_out]`, as a tied output head computes it."""
        return jnp.matmul(x, jnp.swapaxes(self.dense(), -1, -2))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def layout(self) -> Layout:
        """What its axes are."""
        return Layout()

    def partition(self, spec: PartitionSpec) -> "Weight":
        """The same tree with the partition spec of each array, where a plain array's would be
        `spec`, with an entry for each axis of the matrix `[stack..., d_in, d_out]`. Raises
        ValueError where its blocks do not follow from the blocks of such an array."""
        raise ValueError(f"{type(self).__name__} cannot be split by {spec}.")

    def placement(self, spec: PartitionSpec) -> "Weight":
        """The same tree with the partition spec of each array on a mesh where a plain array would
        lie by `spec`, with an entry for each of its axes."""
        raise ValueError(f"{type(self).__name__} cannot lie on a mesh by {spec}.")

    def as_matrix(self, layout: Layout) -> "Weight | jax.Array":
        """The same weight with its axes laid out as `[stack..., d_in, d_out]`."""
        if layout != Layout():
            raise ValueError(f"{type(self).__name__} is a matrix and has no other {layout}.")
        return self


def is_weight(leaf: Any) -> bool:
    return isinstance(leaf, Weight)


def linear(x: jax.Array, w: jax.Array | Weight) -> jax.Array:
    """`x @ w` for a weight of any type: `x [..., d_in]` and `w [d_in, d_out]` to `[..., d_out]`."""
    return w.linear(x) if isinstance(w, Weight) else jnp.matmul(x, w)


def embed(tokens: jax.Array, w: jax.Array | Weight) -> jax.Array:
    """`w[tokens]`: rows of a table `w [vocab, d]` of any type for integer `tokens [...]`."""
    return w.embed(tokens) if isinstance(w, Weight) else jnp.take(w, tokens, axis=0)


def dense(w: jax.Array | Weight) -> jax.Array:
    """The plain array that a weight of any type stands for."""
    return w.dense() if isinstance(w, Weight) else w


def as_matrix(w: jax.Array | Weight, layout: Layout) -> jax.Array | Weight:
    """A weight of any axes as the matrix `[stack..., d_in, d_out]` that `linear` takes."""
    return w.as_matrix(layout) if isinstance(w, Weight) else layout.to_matrix(w)


def transpose(w: jax.Array | Weight) -> jax.Array | Weight:
    """The weight of the transposed matrix; nothing is moved in memory."""
    return w.T if isinstance(w, Weight) else Transposed(w)


@flax.struct.dataclass
class Transposed(Weight):
    """A weight `[..., d_out, d_in]` read as its transpose, as a tied output head reads a table."""

    table: jax.Array | Weight

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.table.shape[:-2], self.table.shape[-1], self.table.shape[-2])

    @property
    def dtype(self) -> Any:
        return self.table.dtype

    @property
    def T(self) -> jax.Array | Weight:  # noqa: N802
        return self.table

    def linear(self, x: jax.Array) -> jax.Array:
        if isinstance(self.table, Weight):
            return self.table.linear_transposed(x)
        return jax.lax.dot_general(x, self.table, (((x.ndim - 1,), (1,)), ((), ())))

    def embed(self, tokens: jax.Array) -> jax.Array:
        return jnp.moveaxis(jnp.take(dense(self.table), tokens, axis=1), 0, -1)

    def dense(self) -> jax.Array:
        return jnp.swapaxes(dense(self.table), -1, -2)


def vary(x: jax.Array, *, like: jax.Array) -> jax.Array:
    """Inside a shard_map: `x` said to differ along the mesh axes that `like` differs along, so that
    its gradient is summed over them."""
    missing = jax.typeof(like).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x


@flax.struct.dataclass
class Shared:
    """A value that every layer of a stack reads whole: `scan_layers` does not slice it."""

    value: Any


def is_shared(leaf: Any) -> bool:
    return isinstance(leaf, Shared)


@flax.struct.dataclass
class Adapted(Weight):
    """A frozen weight bound to one delta node; what `bind` puts in an adapted leaf's place.

    Attributes:
      base: the frozen weight, an array or a quantised `Weight`.
      node: the delta node that says what is added.
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

    def partition(self, spec: PartitionSpec) -> "Adapted":
        stack = PartitionSpec(*spec[:-2])
        base = self.base.partition(spec) if isinstance(self.base, Weight) else spec
        return dataclasses.replace(
            self,
            base=cast(Any, base),
            node=self.node.partition(spec),
            dropout_key=cast(Any, stack if self.dropout_key is not None else None),
            adapter_ids=None if self.adapter_ids is None else Shared(PartitionSpec()),
        )

    def as_matrix(self, layout: Layout) -> "Adapted":
        return dataclasses.replace(
            self, base=as_matrix(self.base, layout), node=self.node.as_matrix()
        )

    @property
    def T(self) -> "Adapted":  # noqa: N802
        return dataclasses.replace(self, base=transpose(self.base), node=self.node.transposed())

    def linear(self, x: jax.Array) -> jax.Array:
        if self.adapter_ids is None:
            return self.node.linear(x, self.base, self.dropout_key)
        apply = lambda node, x, key: node.linear(x, self.base, key)  # noqa: E731
        return jax.vmap(apply)(self._of_rows(), x, self._row_keys(x.shape[0]))

    def embed(self, tokens: jax.Array) -> jax.Array:
        if self.adapter_ids is None:
            return self.node.embed(tokens, self.base)
        return jax.vmap(lambda node, ids: node.embed(ids, self.base))(self._of_rows(), tokens)

    def dense(self) -> jax.Array:
        if self.adapter_ids is not None:
            raise ValueError(
                "a weight whose batch rows use different adapters has no single dense form: "
                "bind one adapter, without adapter_ids."
            )
        return self.node.merge(self.base)

    def _of_rows(self) -> Any:
        """The node of each batch row."""
        ids = cast(Shared, self.adapter_ids).value
        return jax.tree.map(lambda leaf: leaf[ids], self.node)

    def _row_keys(self, rows: int) -> jax.Array | None:
        """A key for each row, for a mask of its own."""
        if self.dropout_key is None:
            return None
        return jax.vmap(jax.random.fold_in, (None, 0))(self.dropout_key, jnp.arange(rows))


def scan_layers(
    body: Callable[[Any, PyTree], tuple[Any, Any]], carry: Any, layers: PyTree, *, unroll: int = 1
) -> tuple[Any, Any]:
    """`jax.lax.scan(body, carry, layers)` over stacked layers of weights of any type.

    Every leaf is sliced along its leading axis but those inside `Shared`, which each step of
    `body` sees whole.
    """
    leaves, treedef = jax.tree.flatten(layers, is_leaf=is_shared)
    sliced = [None if is_shared(leaf) else leaf for leaf in leaves]
    whole = [leaf if is_shared(leaf) else None for leaf in leaves]

    def step(carry, sliced):
        layer = [w if s is None else s for s, w in zip(sliced, whole, strict=True)]
        return body(carry, jax.tree.unflatten(treedef, layer))

    return jax.lax.scan(step, carry, sliced, unroll=unroll)
