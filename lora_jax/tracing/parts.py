"""A weight of which a program uses a part of one side, or parts of a side as if stacked."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import node_parts
from lora_jax.adapted import Adapted
from lora_jax.quant.quantized import Quantized
from lora_jax.tracing.modified import Modified
from lora_jax.weights import (
    Shared,
    Weight,
    cast,
    dense,
    dense_float32,
    embed,
    linear,
    through,
    transpose,
)

_SWAPPED = {"in": "out", "out": "in"}


@flax.struct.dataclass
class Taken(Weight):
    """The rows or columns `picked` of a weight whose parts are no weights of its type: inputs are
    put among zeros, or outputs taken.

    Attributes:
      weight: `[stack..., d_in, d_out]`.
      picked: `Shared` integers `[n]`.
      side: "in" or "out".
    """

    weight: Any
    picked: Shared
    side: str = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, d_in, d_out = self.weight.shape
        n = self.picked.value.shape[0]
        return (*stack, n, d_out) if self.side == "in" else (*stack, d_in, n)

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    @property
    def T(self) -> "Taken":  # noqa: N802
        return dataclasses.replace(self, weight=transpose(self.weight), side=_SWAPPED[self.side])

    def linear(self, x: jax.Array) -> jax.Array:
        if self.side == "in":
            zeros = jnp.zeros((*x.shape[:-1], self.weight.shape[-2]), x.dtype)
            return linear(zeros.at[..., self.picked.value].set(x), self.weight)
        return self._columns(linear(x, self.weight))

    def through(self, product: Any, x: jax.Array) -> jax.Array:
        if self.side == "in":
            raise ValueError("only a part of its inputs is used.")
        return self._columns(through(product, x, self.weight))

    def embed(self, tokens: jax.Array) -> jax.Array:
        if self.side == "in":
            return embed(self.picked.value[tokens], self.weight)
        return self._columns(embed(tokens, self.weight))

    def dense(self) -> jax.Array:
        return self._entries(dense(self.weight))

    def dense_float32(self) -> jax.Array:
        return self._entries(dense_float32(self.weight))

    def cast(self, dtype: Any) -> "Taken":
        return dataclasses.replace(self, weight=cast(self.weight, dtype))

    def local_specs(self, spec: Any) -> Any:
        raise ValueError("a part of it cannot be split over a mesh.")

    def _columns(self, y: jax.Array) -> jax.Array:
        return jnp.take(y, self.picked.value, axis=-1, mode="clip")

    def _entries(self, matrix: jax.Array) -> jax.Array:
        axis = -2 if self.side == "in" else -1
        return jnp.take(matrix, self.picked.value, axis=axis, mode="clip")


@dataclasses.dataclass(frozen=True)
class Pick:
    """Entries of one atom among the atoms of a side.

    Attributes:
      sizes: of the atoms of the side.
      place: of the atom among them.
      picked: int32 within its size, increasing.
    """

    sizes: tuple[int, ...]
    place: int
    picked: Any

    def __call__(self, array: jax.Array, axis: int) -> jax.Array:
        """What an array has of them along a negative axis."""
        axis += array.ndim
        shape = array.shape
        split = array.reshape(*shape[:axis], *self.sizes, *shape[axis + 1 :])
        part = self._of_one_axis(split, axis + self.place)
        return part.reshape(*shape[:axis], -1, *shape[axis + 1 :])

    def _of_one_axis(self, array: jax.Array, axis: int) -> jax.Array:
        picked = self.picked
        if isinstance(picked, np.ndarray):
            steps = np.diff(picked)
            if len(picked) == 1 or (steps == steps[0]).all():
                step = int(steps[0]) if len(picked) > 1 else 1
                return jax.lax.slice_in_dim(array, picked[0], picked[-1] + 1, step, axis)
        return jnp.take(array, picked, axis=axis, mode="clip")


def part_of(weight: Any, side: str, pick: Pick) -> Any:
    """A weight `[stack..., d_in, d_out]` with what `pick` says of one side."""
    if isinstance(weight, Modified):
        own = weight.rows if side == "in" else weight.columns
        own = None if own is None else pick(own, -1)
        rows, columns = (own, weight.columns) if side == "in" else (weight.rows, own)
        inner = part_of(weight.weight, side, pick)
        return dataclasses.replace(weight, weight=inner, rows=rows, columns=columns)
    if isinstance(weight, Adapted) and side in weight.node.part_axes:
        node = node_parts.parts(weight.node, side, pick)
        return dataclasses.replace(weight, base=part_of(weight.base, side, pick), node=node)
    if isinstance(weight, Quantized) and side == "out":
        part: Any = node_parts.parts(weight.singly(), side, pick)
        return dataclasses.replace(part, output=(part.codes.shape[-1],))
    if isinstance(weight, Weight):
        indices = jnp.arange(math.prod(pick.sizes), dtype=jnp.int32)
        return Taken(weight, Shared(pick(indices, -1)), side)
    return pick(weight, -2 if side == "in" else -1)


@dataclasses.dataclass(frozen=True)
class Side:
    """The atoms of one side of a matrix: their sizes, and which of them become stack axes."""

    sizes: tuple[int, ...]
    stacked: tuple[bool, ...]


def stacked(weight: Any, stack_ndim: int, d_in: Side, d_out: Side) -> Any:
    """A weight with atoms of its sides as the last stack axes, those of the rows first; None where
    its type has no such form."""
    sides = {"in": d_in, "out": d_out}

    def move(array: jax.Array, names: Sequence[str]) -> jax.Array:
        """An array `[stack..., names...]`."""
        shape = list(array.shape[:stack_ndim])
        front: list[tuple[str, int]] = []
        back: list[tuple[str, int]] = []
        for name, size in zip(names, array.shape[stack_ndim:], strict=True):
            side = sides.get(name)
            if side is None or not any(side.stacked):  # of codes and scales, a part of that size
                side = Side((size,), (False,))
            for part, moves in zip(side.sizes, side.stacked, strict=True):
                (front if moves else back).append((name, len(shape)))
                shape.append(part)
        array = array.reshape(shape)
        order = [place for _, place in front] + [place for _, place in back]
        array = jnp.transpose(array, [*range(stack_ndim), *order])
        full, at = list(array.shape[:stack_ndim]), stack_ndim
        target = list(full)
        for name, side in sides.items():
            for part, moves in zip(side.sizes, side.stacked, strict=True):
                if moves:
                    full.append(part if name in names else 1)
                    target.append(part)
                    at += name in names
        left = list(zip(back, array.shape[at:], strict=True))
        rest = [math.prod(size for (own, _), size in left if own == name) for name in names]
        return jnp.broadcast_to(array.reshape(*full, *rest), (*target, *rest))

    def of(weight: Any) -> Any:
        if isinstance(weight, Modified):
            inner = of(weight.weight)
            if inner is None:
                return None

            def vector(array, *names):
                return None if array is None else move(array, names)

            return dataclasses.replace(
                weight,
                weight=inner,
                rows=vector(weight.rows, "in"),
                columns=vector(weight.columns, "out"),
                present=vector(weight.present),
            )
        if isinstance(weight, Adapted):
            needs = {name for name, side in sides.items() if any(side.stacked)}
            base = of(weight.base)
            if base is None or weight.adapter_ids or not needs <= set(weight.node.part_axes):
                return None
            key = weight.dropout_key
            return dataclasses.replace(
                weight,
                base=base,
                node=node_parts.restacked(weight.node, move),
                dropout_key=None if key is None else move(key, ()),
            )
        if isinstance(weight, Quantized) and not any(d_in.stacked):
            part: Any = node_parts.restacked(weight.singly(), move)
            return dataclasses.replace(part, output=(part.codes.shape[-1],))
        if isinstance(weight, Weight):
            return None
        return move(weight, ("in", "out"))

    return of(weight)
