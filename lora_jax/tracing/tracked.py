"""The protocol of a value in the place of a leaf while a jaxpr is evaluated."""

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import jax
import numpy as np

from lora_jax.tracing.axes import Axes


@dataclasses.dataclass(frozen=True)
class Product:
    """A `dot_general` of a tracked value with an array `x`.

    Attributes:
      w_contracted: the axes of the tracked value that are summed over; `x_contracted` are those of
        `x` that they meet.
      w_batch: the axes of the tracked value that run along with `x_batch`.
      w_first: whether the tracked value is the left operand.
      precision: the `precision` parameter.
      dtype: of the result.
      shape: of the result.
    """

    w_contracted: tuple[int, ...]
    x_contracted: tuple[int, ...]
    w_batch: tuple[int, ...]
    x_batch: tuple[int, ...]
    w_first: bool
    precision: Any
    dtype: Any
    shape: tuple[int, ...]

    def of_arrays(self, x: jax.Array, w: jax.Array) -> jax.Array:
        ours = (self.w_contracted, self.w_batch), (self.x_contracted, self.x_batch)
        (left, left_batch), (right, right_batch) = ours if self.w_first else ours[::-1]
        return jax.lax.dot_general(
            *((w, x) if self.w_first else (x, w)),
            ((left, right), (left_batch, right_batch)),
            precision=self.precision,
            preferred_element_type=self.dtype,
        )


@dataclasses.dataclass(frozen=True)
class Convolved:
    """A convolution of an array `x` with a tracked kernel.

    Attributes:
      x, w, out: the places of (batch, features, space...) in `x`, of (outputs, inputs, space...) in
        the kernel, of (batch, features, space...) in the result.
      groups: of features.
      run: the program's own convolution of x and a kernel, in a number of groups.
      shape: of the result.
    """

    x: tuple[int, ...]
    w: tuple[int, ...]
    out: tuple[int, ...]
    groups: int
    run: Callable[[jax.Array, jax.Array, int], jax.Array]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Ragged:
    """A `ragged_dot` of rows `x`, sorted by expert, with a tracked stack of experts.

    Attributes:
      x_row, x_contracted: the axis of x along which its rows are, and those that are summed over.
      w_expert, w_contracted: the axis of experts, and those that meet `x_contracted`.
      run: of `x [m, d_in]`, `w [g, d_in, n]` and the group sizes.
      run_as_traced: the program's own product of x, w and the group sizes.
    """

    x_row: int
    x_contracted: tuple[int, ...]
    w_expert: int
    w_contracted: tuple[int, ...]
    run: Callable[..., jax.Array]
    run_as_traced: Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A `gather` of full slices of a tracked value along one axis, by int32 `ids` within bounds.

    Attributes:
      axis: the axis of the tracked value that the ids index.
      offset_dims: the axes of the result that the other axes of the tracked value become.
    """

    axis: int
    offset_dims: tuple[int, ...]


class RefusedError(Exception):
    """A leaf is used in a way that its tracked value does not allow.

    Attributes:
      path: of the leaf.
      reason: what the program did with it.
      advice: the ways out.
      primitive, line: what read it and where, filled in on the way out of the walk.
    """

    primitive: str | None = None
    line: str | None = None

    def __init__(self, path: str, reason: str, advice: str):
        super().__init__(path, reason, advice)
        self.path, self.reason, self.advice = path, reason, advice

    def message(self) -> str:
        where = f"{self.primitive}, at {self.line or 'an unknown line'},"
        if self.primitive is None:
            where = "the function returns what"
        return f"{self.path}: {where} {self.reason}. {self.advice}".rstrip()


class Tracked(abc.ABC):
    """A leaf as the program has it now. Subclasses are `flax.struct.dataclass`es with static fields
    `path` (of the leaf), `axes` (where its axes are now) and `dtype` (what it was cast to)."""

    path: str
    axes: Axes
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.axes.shape

    def within(self, jaxpr: Any, eqn: Any) -> AbstractContextManager[None]:
        """The context in which an equation of a jaxpr that reads this value is evaluated."""
        del jaxpr, eqn
        return contextlib.nullcontext()

    @abc.abstractmethod
    def moved(self, axes: Axes, move: Callable[[jax.Array], jax.Array]) -> Self:
        """The same entries arranged as `axes`, as `move` arranges a plain array."""

    def arranged(self, name: str, params: dict[str, Any]) -> "Tracked | None":
        """After an equation that moves axes: "transpose", "squeeze", "broadcast_in_dim", "reshape";
        None where it does more than that."""
        axes = AFTER[name](self.axes, params)
        return None if axes is None else self.moved(axes, lambda a: MOVES[name](a, params))

    def settled(self) -> "Self | jax.Array":
        """The plain array, where that may be built, as of a part of a table; else the value."""
        return self

    @abc.abstractmethod
    def cast(self, dtype: Any) -> Self:
        """The same values in another dtype."""

    @abc.abstractmethod
    def each(self, change: Callable[[jax.Array], jax.Array]) -> Self:
        """With `change`, which keeps values and shapes, applied to every array inside."""

    @abc.abstractmethod
    def window(self, axis: int, picked: jax.Array | np.ndarray) -> "Self | jax.Array":
        """The entries `picked`, increasing int32 within bounds, along one axis; the axis stays,
        even at size 1."""

    @abc.abstractmethod
    def scanned(self) -> tuple[Any, Callable[[Any], "Self | jax.Array"]]:
        """What a scan slices along its leading axis, and a function from a slice to one layer."""

    @abc.abstractmethod
    def sharded(
        self, spec: Sequence[Any], blocks: Callable[[Any], int]
    ) -> tuple[Any, Any, Callable[[Any], Self]]:
        """The argument of a shard_map for this, its specs, and a function from the block of one
        device to its tracked value.

        Args:
          spec: for each axis, the mesh axes that it is split over, or None.
          blocks: the number of blocks that an entry of `spec` means.
        """

    @abc.abstractmethod
    def contract(self, x: jax.Array, product: Product) -> jax.Array:
        """The product's result."""

    @abc.abstractmethod
    def convolve(self, x: jax.Array, convolved: Convolved) -> jax.Array:
        """The convolution's result."""

    @abc.abstractmethod
    def multiplied(self, factor: jax.Array) -> "Self | jax.Array":
        """Times a scalar, or an array with as many axes, of which some may have size 1."""

    @abc.abstractmethod
    def by_expert(self, x: jax.Array, sizes: jax.Array, ragged: Ragged) -> jax.Array:
        """The product's result."""

    @abc.abstractmethod
    def rows(self, ids: jax.Array, lookup: Lookup) -> "Self | jax.Array":
        """The lookup's result: rows of a table, or the layers of a stack that the ids name."""

    def filled(self, within: jax.Array, fill: float, axes: Sequence[int]) -> "Self | jax.Array":
        """With `fill` in the place of the layers where `within` is False, which has the shape of
        the ids that picked them; their axes are `axes`."""
        del within, fill, axes
        return self.read("fills layers of a stack that are out of bounds")

    @abc.abstractmethod
    def carried(self, after: Any) -> Any:
        """What a loop carries to the next iteration, when one turns this value into `after`. Raises
        RefusedError where the two differ in structure."""

    @abc.abstractmethod
    def read(self, reason: str = "would build the dense weight") -> jax.Array:
        """The plain array, where no rule covers what the program does. Raises RefusedError, with
        this reason, where it must not be built."""

    @abc.abstractmethod
    def dense(self) -> jax.Array:
        """The plain array as the program has it now; builds it."""


AFTER: dict[str, Callable[[Axes, dict[str, Any]], Axes | None]] = {
    "transpose": lambda axes, params: axes.transposed(params["permutation"]),
    "squeeze": lambda axes, params: axes.without(params["dimensions"]),
    "broadcast_in_dim": lambda axes, params: axes.broadcast(
        params["shape"], params["broadcast_dimensions"]
    ),
    "reshape": lambda axes, params: (
        axes if params["dimensions"] is None else axes.transposed(params["dimensions"])
    ).reshaped(params["new_sizes"]),
}
MOVES: dict[str, Callable[[jax.Array, dict[str, Any]], jax.Array]] = {
    "transpose": lambda array, params: jax.lax.transpose(array, params["permutation"]),
    "squeeze": lambda array, params: jax.lax.squeeze(array, params["dimensions"]),
    "broadcast_in_dim": lambda array, params: jax.lax.broadcast_in_dim(
        array, params["shape"], params["broadcast_dimensions"]
    ),
    "reshape": lambda array, params: jax.lax.reshape(
        array, params["new_sizes"], params["dimensions"]
    ),
}


def is_tracked(value: Any) -> bool:
    return isinstance(value, Tracked)
