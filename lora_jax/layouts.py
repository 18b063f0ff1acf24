"""Which axes of a weight are stacked, contracted with an activation, or gained by it."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a leaf an activation is contracted with, and which ones it gains.

    Attributes:
      contracted, output: the axes, negative, in the order in which the matrix takes them.
      gathered: whether rows are looked up in it by index, as in an embedding; "all-linear" leaves
        such a leaf out.
      groups: of a grouped convolution, whose first output axis is that many groups, each with
        inputs of its own: a stack axis behind the others.

    Axes that neither tuple names are stack axes. The default is a matrix `[stack..., d_in, d_out]`;
    a Flax attention kernel `[d, heads, head_dim]` is `Layout(contracted=(-3,), output=(-2, -1))`,
    and a weight applied from the left, `w @ x`, is `Layout(contracted=(-1,), output=(-2,))`.
    """

    contracted: tuple[int, ...] = (-2,)
    output: tuple[int, ...] = (-1,)
    gathered: bool = dataclasses.field(default=False, compare=False)
    groups: int = 1

    def stack_axes(self, ndim: int) -> tuple[int, ...]:
        """The other axes of a leaf of `ndim` axes, negative, in order."""
        named = {*self.contracted, *self.output}
        return tuple(axis for axis in range(-ndim, 0) if axis not in named)

    def split(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """`shape` as (stack, contracted, output) dimensions.

        Raises:
          ValueError: if the axes are not negative, not distinct, or more than `shape` has, or the
            output is not divisible by the groups.
        """
        axes = (*self.contracted, *self.output)
        distinct = len(set(axes)) == len(axes) and bool(self.contracted) == bool(self.output)
        if not distinct or not all(-len(shape) <= axis < 0 for axis in axes):
            raise ValueError(
                f"{self} does not fit shape {tuple(shape)}: expected distinct negative axes, at "
                "least one contracted and one output, for example contracted=(-3,), "
                "output=(-2, -1)."
            )
        groups = (self.stack_axes(len(shape)), self.contracted, self.output)
        stack, contracted, output = (tuple(shape[axis] for axis in group) for group in groups)
        if self.groups > 1:
            if output[0] % self.groups:
                raise ValueError(f"{self} does not fit shape {tuple(shape)}: {self.groups} groups.")
            stack, output = (*stack, self.groups), (output[0] // self.groups, *output[1:])
        return stack, contracted, output

    def split_spec(self, spec: tuple) -> tuple[tuple, ...]:
        """A sharding spec with an entry for each axis as those of (stack, contracted, output): of a
        grouped axis the groups are sharded."""
        groups = (self.stack_axes(len(spec)), self.contracted, self.output)
        stack, contracted, output = (tuple(spec[axis] for axis in group) for group in groups)
        if self.groups > 1:
            stack, output = (*stack, output[0]), (None, *output[1:])
        return stack, contracted, output

    def joined(self, stack: tuple, contracted: tuple, output: tuple) -> tuple[int, ...]:
        """The shape that `split` makes these dimensions of."""
        if self.groups > 1:
            stack, output = stack[:-1], (stack[-1] * output[0], *output[1:])
        dims = (*stack, *contracted, *output)
        order = (*self.stack_axes(len(dims)), *self.contracted, *self.output)
        return tuple(dims[order.index(axis)] for axis in range(-len(dims), 0))

    def to_matrix(self, leaf: jax.Array) -> jax.Array:
        """The leaf as `[stack..., d_in, d_out]`."""
        stack, d_in, d_out = self.split(leaf.shape)
        order = (*self.stack_axes(leaf.ndim), *self.contracted, *self.output)
        moved = jnp.transpose(leaf, [axis + leaf.ndim for axis in order])
        if self.groups > 1:
            moved = moved.reshape(*stack[:-1], math.prod(d_in), self.groups, math.prod(d_out))
            moved = jnp.moveaxis(moved, -2, -3)
        return moved.reshape(*stack, math.prod(d_in), math.prod(d_out))

    def from_matrix(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The leaf of `shape` that `to_matrix` makes `matrix [stack..., d_in, d_out]` of."""
        stack, d_in, d_out = self.split(shape)
        order = (*self.stack_axes(len(shape)), *self.contracted, *self.output)
        places = [order.index(axis) for axis in range(-len(shape), 0)]
        if self.groups > 1:
            matrix = jnp.moveaxis(matrix, -3, -2)
            stack, d_out = stack[:-1], (self.groups * d_out[0], *d_out[1:])
        return jnp.transpose(matrix.reshape(*stack, *d_in, *d_out), places)


class Layouts(dict[str, Layout | None]):
    """What `infer_layouts` returns: `{path: Layout}`, and None for leaves that are no matrices.

    Attributes:
      reasons: `{path: reason}` for each leaf that is no matrix: what the program does with it, and
        the line.
    """

    def __init__(self, layouts: Mapping[str, Layout | None], reasons: Mapping[str, str]):
        super().__init__(layouts)
        self.reasons = dict(reasons)


# The layout of a leaf that is adapted entry by entry: all its axes are stack axes.
ENTRIES = Layout(contracted=(), output=())
