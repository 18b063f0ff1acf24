"""Tracked values and arrays that the program has concatenated, stacked or padded."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.tracing.axes import Axes
from lora_jax.tracing.plain import read_dense
from lora_jax.tracing.tracked import (
    Convolved,
    Lookup,
    Product,
    Ragged,
    RefusedError,
    Tracked,
    is_tracked,
)


@flax.struct.dataclass
class Joined(Tracked):
    """Pieces, tracked or plain, one after the other along an axis. A product applies each piece."""

    pieces: tuple[Any, ...]
    axis: int = flax.struct.field(pytree_node=False)
    path: str = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, pieces: Sequence[Any], axis: int) -> "Joined":
        path = next(piece.path for piece in pieces if is_tracked(piece))
        return cls(pieces=tuple(pieces), axis=axis, path=path)

    @property
    def shape(self) -> tuple[int, ...]:
        return _with(self.pieces[0].shape, self.axis, sum(self.sizes()))

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.pieces[0].dtype)

    def sizes(self) -> list[int]:
        return [piece.shape[self.axis] for piece in self.pieces]

    def within(self, jaxpr: Any, eqn: Any) -> AbstractContextManager[None]:
        return self._first().within(jaxpr, eqn)

    def _first(self) -> Tracked:
        return next(piece for piece in self.pieces if is_tracked(piece))

    def _each(self, tracked: Callable, plain: Callable, axis: int | None = None) -> "Joined":
        pieces = [tracked(piece) if is_tracked(piece) else plain(piece) for piece in self.pieces]
        return Joined.of(pieces, self.axis if axis is None else axis)

    def arranged(self, name: str, params: dict[str, Any]) -> "Joined | None":
        """After an equation that moves axes; None where it moves what is joined into another."""
        if name == "transpose":
            order = params["permutation"]
            return self._each(
                lambda p: p.arranged(name, params),
                lambda p: jnp.transpose(p, order),
                order.index(self.axis),
            )
        if name == "squeeze":
            dropped = params["dimensions"]
            if self.axis in dropped:
                return None
            before = sum(dim < self.axis for dim in dropped)
            return self._each(
                lambda p: p.arranged(name, params),
                lambda p: jnp.squeeze(p, dropped),
                self.axis - before,
            )
        shapes = {"broadcast_in_dim": self._broadcast, "reshape": self._reshaped}
        return shapes[name](params)

    def _broadcast(self, params: dict[str, Any]) -> "Joined | None":
        shape, dims = params["shape"], params["broadcast_dimensions"]
        place = dims[self.axis]
        if tuple(shape[dim] for dim in dims) != self.shape or np.prod(shape) != np.prod(self.shape):
            return None
        pieces = []
        for piece in self.pieces:
            own = {"shape": _with(shape, place, piece.shape[self.axis])}
            own["broadcast_dimensions"] = dims
            pieces.append(
                piece.arranged("broadcast_in_dim", own)
                if is_tracked(piece)
                else jax.lax.broadcast_in_dim(piece, own["shape"], dims)
            )
        return None if any(piece is None for piece in pieces) else Joined.of(pieces, place)

    def _reshaped(self, params: dict[str, Any]) -> "Joined | None":
        shape, before = params["new_sizes"], int(np.prod(self.shape[: self.axis]))
        places = [
            i
            for i, size in enumerate(shape)
            if size == self.shape[self.axis] and int(np.prod(shape[:i])) == before
        ]
        if not places or params["dimensions"] is not None:
            return None
        pieces = []
        for piece in self.pieces:
            sizes = _with(shape, places[0], piece.shape[self.axis])
            own = {"new_sizes": sizes, "dimensions": None}
            pieces.append(
                piece.arranged("reshape", own) if is_tracked(piece) else piece.reshape(sizes)
            )
        return None if any(piece is None for piece in pieces) else Joined.of(pieces, places[0])

    def moved(self, axes: Axes, move: Callable) -> NoReturn:
        raise AssertionError("arranged instead")

    def cast(self, dtype: Any) -> "Joined":
        return self._each(lambda p: p.cast(dtype), lambda p: p.astype(dtype))

    def each(self, change: Callable) -> "Joined":
        return self._each(lambda p: p.each(change), change)

    def multiplied(self, factor: jax.Array) -> "Joined":
        factors = [factor] * len(self.pieces)
        if factor.ndim and factor.shape[self.axis] > 1:
            factors = self._split(factor, self.axis)
        pairs = zip(self.pieces, factors, strict=True)
        pieces = [p.multiplied(f) if is_tracked(p) else p * f for p, f in pairs]
        return Joined.of(pieces, self.axis) if any(map(is_tracked, pieces)) else pieces[0]

    def window(self, axis: int, picked: jax.Array | np.ndarray) -> Any:
        def of(piece, own):
            if len(own) == piece.shape[axis]:
                return piece
            if is_tracked(piece):
                return piece.window(axis, own)
            return jnp.take(piece, own, axis=axis, mode="clip")

        if axis != self.axis:
            return self._each(lambda p: of(p, picked), lambda p: of(p, picked))
        if not isinstance(picked, np.ndarray):
            self._refuse("slices what it has joined, where only the run tells")
        pieces, first = [], 0
        for piece, size in zip(self.pieces, self.sizes(), strict=True):
            own = picked[(picked >= first) & (picked < first + size)] - first
            if len(own):
                pieces.append(of(piece, own.astype(np.int32)))
            first += size
        if len(pieces) == 1:
            return pieces[0]
        if not any(map(is_tracked, pieces)):
            return jnp.concatenate(pieces, axis)
        return Joined.of(pieces, axis)

    def scanned(self) -> tuple[Any, Callable]:
        if self.axis == 0:
            self._refuse("scans over what it has joined")
        pairs = [p.scanned() if is_tracked(p) else (p, lambda piece: piece) for p in self.pieces]

        def layer(slices):
            made = [make(piece) for (_, make), piece in zip(pairs, slices, strict=True)]
            return Joined.of(made, self.axis - 1)

        return [piece for piece, _ in pairs], layer

    def sharded(self, spec: Sequence[Any], blocks: Callable) -> NoReturn:
        self._refuse("splits what it has joined over a mesh")

    def contract(self, x: jax.Array, product: Product) -> jax.Array:
        contracted = self.axis in product.w_contracted
        batch = self.axis in product.w_batch
        if contracted or batch:
            ours, theirs = (
                (product.w_contracted, product.x_contracted)
                if contracted
                else (product.w_batch, product.x_batch)
            )
            parts = self._split(x, theirs[ours.index(self.axis)])
        else:
            parts = [x] * len(self.pieces)
        place = self._place(product, x.ndim)
        results = []
        for piece, part in zip(self.pieces, parts, strict=True):
            size = piece.shape[self.axis]
            shape = product.shape if contracted else _with(product.shape, place, size)
            own = dataclasses.replace(product, shape=shape)
            apply = piece.contract if is_tracked(piece) else None
            results.append(apply(part, own) if apply else own.of_arrays(part, piece))
        return sum(results[1:], results[0]) if contracted else jnp.concatenate(results, place)

    def _place(self, product: Product, x_ndim: int) -> int:
        """The axis of the product's result that the joined one becomes."""
        if self.axis in product.w_batch:
            return product.w_batch.index(self.axis)
        named = {*product.w_contracted, *product.w_batch}
        ours = [i for i in range(len(self.shape)) if i not in named]
        theirs = x_ndim - len(product.x_contracted) - len(product.x_batch)
        before = len(product.w_batch) + (0 if product.w_first else theirs)
        return before + ours.index(self.axis) if self.axis in ours else 0

    def convolve(self, x: jax.Array, convolved: Convolved) -> jax.Array:
        return convolved.run(x, self.read("convolves with what it has joined"), convolved.groups)

    def by_expert(self, x: jax.Array, sizes: jax.Array, ragged: Ragged) -> jax.Array:
        return ragged.run_as_traced(x, self.read("joins experts"), sizes)

    def rows(self, ids: jax.Array, lookup: Lookup) -> Any:
        return self.read("looks up entries of what it has joined")

    def carried(self, after: Any) -> Any:
        structures: Any = jax.tree.structure(after), jax.tree.structure(self)
        if structures[0] != structures[1]:
            self._refuse("carries it through a loop that returns it changed")
        return after

    def settled(self) -> "Joined | jax.Array":
        pieces = [piece.settled() if is_tracked(piece) else piece for piece in self.pieces]
        if any(map(is_tracked, pieces)):
            return self
        return jnp.concatenate(pieces, self.axis)

    def read(self, reason: str = "would build the dense weight") -> jax.Array:
        pieces = [piece.read(reason) if is_tracked(piece) else piece for piece in self.pieces]
        return jnp.concatenate(pieces, self.axis)

    def dense(self) -> jax.Array:
        pieces = [piece.dense() if is_tracked(piece) else piece for piece in self.pieces]
        return jnp.concatenate(pieces, self.axis)

    def _split(self, array: jax.Array, axis: int) -> list[jax.Array]:
        return jnp.split(array, np.cumsum(self.sizes())[:-1].tolist(), axis=axis)

    def _refuse(self, reason: str) -> NoReturn:
        self.read(reason)  # a tracked piece knows the ways out
        raise RefusedError(self.path, reason, "Leave this path out.")


def _with(shape: Sequence[int], place: int, size: int) -> tuple[int, ...]:
    return (*shape[:place], size, *shape[place + 1 :])


def concatenate(eqn: Any, operands: list[Any]) -> list[Any]:
    return [Joined.of(operands, eqn.params["dimension"])]


def stack(eqn: Any, operands: list[Any]) -> list[Any]:
    axis = eqn.params["axis"]

    def expanded(piece):
        shape = (*piece.shape[:axis], 1, *piece.shape[axis:])
        dims = tuple(i for i in range(len(shape)) if i != axis)
        if not is_tracked(piece):
            return jnp.expand_dims(piece, axis)
        return piece.arranged("broadcast_in_dim", {"shape": shape, "broadcast_dimensions": dims})

    return [Joined.of([expanded(piece) for piece in operands], axis)]


def pad(eqn: Any, operands: list[Any]) -> list[Any]:
    """Edges of one number; dilation and cropping have no rule."""
    value, number = operands
    config = eqn.params["padding_config"]
    if not is_tracked(value) or is_tracked(number) or any(min(c) < 0 or c[2] for c in config):
        return read_dense(eqn, operands)
    for axis, (low, high, _) in enumerate(config):
        edges = [
            jnp.broadcast_to(number, _with(value.shape, axis, int(size))).astype(value.dtype)
            for size in (low, high)
        ]
        pieces = [edges[0]] * int(low > 0) + [value] + [edges[1]] * int(high > 0)
        value = Joined.of(pieces, axis) if len(pieces) > 1 else value
    return [value]


RULES = {"concatenate": concatenate, "stack": stack, "pad": pad}
