"""Where the axes of a leaf are after a program has transposed, reshaped and sliced it."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Self

from lora_jax.layouts import Layout


@dataclasses.dataclass(frozen=True, order=True)
class Atom:
    """A leaf's axis, or a part of one that a reshape has split.

    Attributes:
      axis: the axis of the leaf that it comes from, negative.
      part: which part, in row-major order: () for all of it, (0,) and (1,) for its halves.
      size: the dimension.
    """

    axis: int
    part: tuple[int, ...]
    size: int


def size_of(atoms: Iterable[Atom]) -> int:
    return math.prod(atom.size for atom in atoms)


@dataclasses.dataclass(frozen=True)
class Axes:
    """For each axis of a value, the atoms of the leaf that it is made of, slowest first.

    An atom of size 1 has an axis to itself: where it would share one, it is dropped.
    """

    atoms: tuple[tuple[Atom, ...], ...]

    @classmethod
    def of_leaf(cls, shape: Sequence[int]) -> Self:
        return cls(tuple((Atom(i - len(shape), (), size),) for i, size in enumerate(shape)))

    def grouped(self, layout: Layout) -> "Axes":
        """The axes of a leaf with the groups of its first output axis as an atom of their own."""
        if layout.groups == 1:
            return self
        place = layout.output[0] + len(self.atoms)
        (atom,) = self.atoms[place]
        return self.replaced(place, _split(atom, layout.groups))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(atom.size for atom in axis) for axis in self.atoms)

    def all(self) -> list[Atom]:
        return [atom for axis in self.atoms for atom in axis]

    def chosen(self, axes: Sequence[int]) -> list[Atom]:
        """The atoms of these axes of the value, in their order."""
        return [atom for axis in axes for atom in self.atoms[axis]]

    def transposed(self, permutation: Sequence[int]) -> "Axes":
        return Axes(tuple(self.atoms[axis] for axis in permutation))

    def without(self, axes: Sequence[int]) -> "Axes":
        return Axes(tuple(atoms for i, atoms in enumerate(self.atoms) if i not in axes))

    def replaced(self, axis: int, atoms: tuple[Atom, ...]) -> "Axes":
        return Axes((*self.atoms[:axis], atoms, *self.atoms[axis + 1 :]))

    def looked_up(self, axis: int, shape: Sequence[int], offset_dims: Sequence[int]) -> "Axes":
        """Of the layers that ids of this shape pick along an axis of one atom: an atom for each
        axis of the ids, beside the other axes, which are at `offset_dims`."""
        (atom,) = self.atoms[axis] or (Atom(0, (), 1),)  # an axis that the program added
        ids = iter(
            (dataclasses.replace(atom, part=(*atom.part, i), size=size),)
            for i, size in enumerate(shape)
        )
        others = dict(zip(offset_dims, self.without((axis,)).atoms, strict=True))
        count = len(shape) + len(others)
        return Axes(tuple(others[i] if i in others else next(ids) for i in range(count)))

    def resized(self, size: Callable[[int, Atom], int]) -> "Axes":
        """Each atom of an axis with the size that `size(axis, atom)` gives it."""
        return Axes(
            tuple(
                tuple(dataclasses.replace(atom, size=size(axis, atom)) for atom in atoms)
                for axis, atoms in enumerate(self.atoms)
            )
        )

    def broadcast(self, shape: Sequence[int], dimensions: Sequence[int]) -> "Axes | None":
        """With new axes of size 1; None where an axis would be repeated."""
        atoms: list[tuple[Atom, ...]] = [()] * len(shape)
        for ours, place in zip(self.atoms, dimensions, strict=True):
            atoms[place] = ours
        axes = Axes(tuple(atoms))
        return axes if axes.shape == tuple(shape) else None

    def reshaped(self, shape: Sequence[int]) -> "Axes | None":
        """Axes merged and split to `shape`; None where an atom cannot be split evenly."""
        queue = self.all()[::-1]
        made = []
        for size in shape:
            taken: list[Atom] = []
            while math.prod(atom.size for atom in taken) < size:
                need = size // math.prod(atom.size for atom in taken)
                atom = queue.pop()
                if atom.size > need:
                    if atom.size % need:
                        return None
                    atom, rest = _split(atom, need)
                    queue.append(rest)
                elif need % atom.size:
                    return None
                taken.append(atom)
            if size == 1 and queue and queue[-1].size == 1:
                taken.append(queue.pop())
            made.append(tuple(a for a in taken if a.size > 1 or len(taken) == 1))
        return Axes(tuple(made))


def _split(atom: Atom, major: int) -> tuple[Atom, Atom]:
    return (
        Atom(atom.axis, (*atom.part, 0), major),
        Atom(atom.axis, (*atom.part, 1), atom.size // major),
    )
