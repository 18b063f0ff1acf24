"""The seam: `linear` and `embed` are the only places where a weight meets an activation.

A *weight* is a `jax.Array` or a `Weight`: a pytree that stands where an array stood, knows its
logical shape, and applies itself. Quantised formats and adapted weights are such pytrees, so that
a model written with `linear` and `embed` takes them all without knowing any.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lora_jax import schema
from lora_jax.layouts import Layout
from lora_jax.schema import Shared as Shared
from lora_jax.schema import is_shared as is_shared

PyTree = Any

# The name, for rematerialisation policies, of what an adapter computes on a narrow axis: a model
# that keeps it spares the backward pass a product for a few bytes.
NARROW = "adapter_narrow"
# And of a layer's output before an adapter scales it: the gradient of the scale needs it again.
UNSCALED = "adapter_unscaled"


class Weight(abc.ABC):
    """What may stand in a params tree instead of an array. Subclasses are registered pytrees; one
    that is to be sharded declares its leaves, see `lora_jax.schema`.

    Attributes:
      own_axes: the names of axes that are not the weight's.
      split_axes: the sides of the matrix, "in" or "out", that a shard_map may split.
    """

    own_axes: ClassVar[tuple[str, ...]] = ()
    split_axes: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        schema.check_class(cls, cls.own_axes)

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

    def through(self, product: Any, x: jax.Array) -> jax.Array:
        """The result of another product with one unstacked weight."""
        return product(x, self)

    @abc.abstractmethod
    def embed(self, tokens: jax.Array) -> jax.Array:
        """`W[tokens]`."""

    @abc.abstractmethod
    def dense(self) -> jax.Array:
        """The plain array; builds it."""

    def dense_float32(self) -> jax.Array:
        """The same in float32. A format that decodes in float32 returns what it decodes, which its
        dtype may not hold: sums and norms are taken of that, and rounded once."""
        return self.dense().astype(jnp.float32)

    def requantized(self, dense: jax.Array) -> "Weight":
        """Another dense weight of this shape, of this dtype or in float32, in this one's format."""
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
        """The roles of its axes."""
        return Layout()

    def local_specs(self, spec: PartitionSpec) -> "Weight":
        """The same tree with each array's spec for a shard_map that splits the matrix
        `[stack..., d_in, d_out]` by `spec`. Raises ValueError where its blocks do not follow from
        the blocks of such an array."""
        return schema.local_specs(self, spec, self.split_axes)

    def sharding_specs(self, spec: PartitionSpec) -> "Weight":
        """The same tree with each array's sharding spec for `jit`, where a plain array would have
        `spec`, with an entry for each of its axes."""
        return schema.sharding_specs(self, *self.layout.split_spec(tuple(spec)))

    def for_part(self, index: jax.Array) -> "Weight":
        """The weight for one part of an input that is multiplied in parts: with dropout, each part
        has its own mask."""
        del index
        return self

    def cast(self, dtype: Any) -> "Weight":
        """The weight with a frozen array in `dtype`; quantised weights and adapters take the dtype
        of their input."""
        del dtype
        return self

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


def through(product: Any, x: jax.Array, w: jax.Array | Weight) -> jax.Array:
    """The result of a product of `lora_jax.products` with a weight of any type."""
    return w.through(product, x) if isinstance(w, Weight) else product(x, w)


def embed(tokens: jax.Array, w: jax.Array | Weight) -> jax.Array:
    """`w[tokens]`: rows of a table `w [vocab, d]` of any type for integer `tokens [...]`."""
    return w.embed(tokens) if isinstance(w, Weight) else jnp.take(w, tokens, axis=0)


def dense(w: jax.Array | Weight) -> jax.Array:
    """The plain array that a weight of any type stands for."""
    return w.dense() if isinstance(w, Weight) else w


def dense_float32(w: jax.Array | Weight) -> jax.Array:
    """The plain array in float32, before a quantised format rounds it to its dtype."""
    return w.dense_float32() if isinstance(w, Weight) else w.astype(jnp.float32)


def cast(w: Any, dtype: Any) -> Any:
    """The weight with a frozen array in `dtype`; quantised weights and adapters take the dtype of
    their input."""
    return w.cast(dtype) if isinstance(w, Weight) else w.astype(dtype)


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

    def dense_float32(self) -> jax.Array:
        return jnp.swapaxes(dense_float32(self.table), -1, -2)

    def cast(self, dtype: Any) -> "Transposed":
        return Transposed(cast(self.table, dtype))


def vary(x: jax.Array, *, like: jax.Array) -> jax.Array:
    """Inside a shard_map: `x` said to differ along the mesh axes that `like` differs along, so that
    its gradient is summed over them."""
    missing = jax.typeof(like).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x


def scan_layers(
    body: Callable[[Any, PyTree], tuple[Any, Any]], carry: Any, layers: PyTree, *, unroll: int = 1
) -> tuple[Any, Any]:
    """`jax.lax.scan(body, carry, layers)` over stacked layers of weights of any type.

    Every leaf is sliced along its leading axis, except those inside `Shared`, which each step of
    `body` gets unsliced.
    """
    leaves, treedef = jax.tree.flatten(layers, is_leaf=is_shared)
    sliced = [None if is_shared(leaf) else leaf for leaf in leaves]
    shared = [leaf if is_shared(leaf) else None for leaf in leaves]

    def step(carry, sliced):
        layer = [w if s is None else s for s, w in zip(sliced, shared, strict=True)]
        return body(carry, jax.tree.unflatten(treedef, layer))

    return jax.lax.scan(step, carry, sliced, unroll=unroll)
