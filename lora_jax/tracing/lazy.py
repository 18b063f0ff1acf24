"""A weight that is applied and never built dense, wherever the program moves its axes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lora_jax.adapted import Adapted
from lora_jax.layouts import Layout
from lora_jax.tracing.applied import Applied
from lora_jax.tracing.applying import arranged
from lora_jax.tracing.axes import Atom, Axes, size_of
from lora_jax.tracing.modified import Modified
from lora_jax.tracing.parts import Pick, Taken, part_of
from lora_jax.tracing.tracked import Lookup, RefusedError
from lora_jax.weights import (
    Weight,
    as_matrix,
    cast,
    dense,
    is_shared,
)

# The ways out, for the path of an adapted weight and of one that is only quantised.
ADAPTED = (
    "Leave this path out ({{{path!r}: None, ...}} in lora_transform's mapping of targets), or run "
    "fn(merge(base, delta), ...) inside the loss, which builds the dense weights."
)
FROZEN = "Leave {path!r} out of quantize's targets, or run fn on dequantize(params)."
INFER = (
    "Give lora_transform the axes as the program uses them: layouts=infer_layouts(fn, params, "
    "*args). "
)


@flax.struct.dataclass
class Lazy(Applied):
    """A weight `[stack..., d_in, d_out]` and the axes in which the program has it now.

    The leading axes of every array in `weight` are the stack axes that `axes` still has, in the
    order of the leaf.

    Attributes:
      is_part: whether it is a part of a side, such as the rows of a table, which may be built.
    """

    weight: Any
    path: str = flax.struct.field(pytree_node=False)
    axes: Axes = flax.struct.field(pytree_node=False)
    dtype: Any = flax.struct.field(pytree_node=False)
    layout: Layout = flax.struct.field(pytree_node=False)
    is_part: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def of_leaf(cls, path: str, weight: Weight) -> "Lazy":
        return cls(
            weight=as_matrix(weight, weight.layout),
            path=path,
            axes=Axes.of_leaf(weight.shape).grouped(weight.layout),
            dtype=jnp.dtype(weight.dtype),
            layout=weight.layout,
        )

    def stack(self) -> list[Atom]:
        named = (*self.layout.contracted, *self.layout.output)
        atoms = self.axes.all()
        groups = [atom for atom in atoms if self._is_group(atom)]
        return [*sorted(atom for atom in atoms if atom.axis not in named), *sorted(groups)]

    def _is_group(self, atom: Atom) -> bool:
        grouped = self.layout.groups > 1 and atom.axis == self.layout.output[0]
        return grouped and atom.part[:1] == (0,)

    def side(self, axes: Sequence[int]) -> list[Atom]:
        """The atoms of the contracted or of the output axes, in the order of the matrix."""
        atoms = [atom for atom in self.axes.all() if not self._is_group(atom)]
        ours = [atom for atom in atoms if atom.axis in axes]
        return sorted(ours, key=lambda atom: (axes.index(atom.axis), atom.part))

    def sides(self) -> tuple[list[Atom], list[Atom]]:
        return self.side(self.layout.contracted), self.side(self.layout.output)

    def moved(self, axes: Axes, move: Callable) -> "Lazy":
        del move
        new = dataclasses.replace(self, axes=axes)
        old, stack = ([atom.size for atom in lazy.stack()] for lazy in (self, new))
        if old == stack:
            return new
        return new._each_stacked(lambda leaf: leaf.reshape(*stack, *leaf.shape[len(old) :]))

    def cast(self, dtype: Any) -> "Lazy":
        return dataclasses.replace(self, weight=cast(self.weight, dtype), dtype=jnp.dtype(dtype))

    def each(self, change: Callable) -> "Lazy":
        return dataclasses.replace(self, weight=jax.tree.map(change, self.weight))

    def window(self, axis: int, picked: jax.Array | np.ndarray) -> "Lazy | jax.Array":
        if self._stacks(axis):
            value, atom, place = self._of_one_atom(axis)
            axes = value.axes.replaced(axis, (dataclasses.replace(atom, size=len(picked)),))
            return dataclasses.replace(value, axes=axes)._each_stacked(
                lambda leaf: jnp.take(leaf, picked, axis=place, mode="clip")
            )
        if (part := self._part(axis, picked)) is not None:
            return part
        self._require_one_table()
        others = [i for i in range(len(self.shape)) if i != axis]
        lookup = Lookup(axis, tuple(range(1, len(self.shape))))
        rows: Any = self.rows(jnp.asarray(picked), lookup)
        return arranged(rows, [axis, *others], list(range(rows.ndim)))

    def _part(self, axis: int, picked: Any) -> "Lazy | None":
        """The entries `picked` along an axis that is one run of atoms of a side."""
        atoms = [atom for atom in self.axes.atoms[axis] if atom.size > 1]
        for name, side in zip(("in", "out"), self.sides(), strict=True):
            side = [atom for atom in side if atom.size > 1]
            if not atoms or atoms[0] not in side:
                continue
            place = side.index(atoms[0])
            if side[place : place + len(atoms)] != atoms:
                return None
            sizes = [a.size for a in (*side[:place], *side[place + len(atoms) :])]
            sizes.insert(place, size_of(atoms))
            weight = part_of(self.weight, name, Pick(tuple(sizes), place, picked))
            atom = dataclasses.replace(atoms[0], size=len(picked))
            axes = self.axes.replaced(axis, (atom,))
            return dataclasses.replace(self, weight=weight, axes=axes, is_part=True)
        return None

    def _require_one_table(self) -> None:
        adapted = self._adapted()
        if adapted is not None and adapted.adapter_ids is not None:
            self._refuse("slices a table of which each batch row has its own")

    def settled(self) -> "Lazy | jax.Array":
        if not self.is_part:
            return self
        self._require_one_table()
        return self.dense()

    def scanned(self) -> tuple[Any, Callable]:
        inner = self.axes.without((0,))
        if not self.axes.atoms[0]:  # an axis of size 1 that the program added in front
            return None, lambda _: dataclasses.replace(self, axes=inner)
        if not self._stacks(0):
            self._contradict("slices it along an axis that is not stacked")
        value, _, place = self._of_one_atom(0)
        leaves, treedef = jax.tree.flatten(value.weight, is_leaf=is_shared)
        slices = [None if is_shared(leaf) else jnp.moveaxis(leaf, place, 0) for leaf in leaves]

        def layer(sliced):
            pairs = zip(leaves, sliced, strict=True)
            weight = treedef.unflatten([w if s is None else s for w, s in pairs])
            return dataclasses.replace(self, weight=weight, axes=inner)

        return slices, layer

    def _stacks(self, axis: int) -> bool:
        """Whether an axis of the value is one of layers, or several of them merged."""
        atoms = self.axes.atoms[axis]
        return bool(atoms) and set(atoms) <= set(self.stack())

    def _of_one_atom(self, axis: int) -> tuple["Lazy", Atom, int]:
        """The same with one atom for the layers of an axis; that atom, and its place in the
        stack."""
        atoms, stack = self.axes.atoms[axis], self.stack()
        place = stack.index(min(atoms))
        if len(atoms) == 1:
            return self, atoms[0], place
        behind = [atom for atom in stack[place:] if atom not in atoms]
        order = [stack.index(atom) for atom in (*stack[:place], *atoms, *behind)]
        atom = dataclasses.replace(min(atoms), size=size_of(atoms))
        sizes = [a.size for a in (*stack[:place], atom, *behind)]

        def join(leaf):
            rest = leaf.shape[len(stack) :]
            ordered = jnp.transpose(leaf, (*order, *range(len(stack), leaf.ndim)))
            return ordered.reshape(*sizes, *rest)

        joined = dataclasses.replace(self, axes=self.axes.replaced(axis, (atom,)))
        return joined._each_stacked(join), atom, place

    def sharded(self, spec: Sequence[Any], blocks: Callable) -> tuple[Any, Any, Callable]:
        entries = dict(zip(self.axes.atoms, spec, strict=True))
        stack = [entries.get((atom,)) for atom in self.stack()]
        matrix = [entries.get(tuple(side[:1])) for side in self.sides()]
        split = sum(entry is not None for entry in spec)
        if split != sum(entry is not None for entry in (*stack, *matrix)):
            self._contradict("splits an axis that is not the first on its side of the matrix")
        specs = self._explained(lambda: self.weight.local_specs(PartitionSpec(*stack, *matrix)))
        axes = self.axes.resized(lambda axis, atom: atom.size // blocks(spec[axis]))
        return self.weight, specs, lambda block: dataclasses.replace(self, weight=block, axes=axes)

    def multiplied(self, factor: jax.Array) -> "Lazy":
        (d_in, d_out), stack = self.sides(), self.stack()
        varying = [i for i, size in enumerate(factor.shape) if size > 1]
        touched = set(self.axes.chosen(varying))
        if touched & set(d_in) and touched & set(d_out):
            self._refuse("multiplies it entry by entry")
        side = d_in if touched & set(d_in) else d_out
        labels = [a for i in varying for a in self.axes.atoms[i] if a.size > 1]
        vector = arranged(
            factor.reshape([a.size for a in labels]),
            labels,
            [a for a in (*stack, *side) if a in touched and a.size > 1],
        )
        ones = [a.size if a in touched else 1 for a in (*stack, *side)]
        vector = jnp.broadcast_to(vector.reshape(ones), [a.size for a in (*stack, *side)])
        vector = vector.reshape(*(a.size for a in stack), size_of(side))
        if side is d_in:
            return dataclasses.replace(self, weight=Modified(self.weight, rows=vector))
        return dataclasses.replace(self, weight=Modified(self.weight, columns=vector))

    def filled(self, within: jax.Array, fill: float, axes: Sequence[int]) -> "Lazy":
        stack, ids = self.stack(), self.axes.chosen(axes)
        present = arranged(within, ids, [atom for atom in stack if atom in ids])
        present = present.reshape([atom.size if atom in ids else 1 for atom in stack])
        present = jnp.broadcast_to(present, [atom.size for atom in stack])
        weight = Modified(self.weight, present=present, fill=fill)
        return dataclasses.replace(self, weight=weight)

    def carried(self, after: Any) -> Any:
        structures: Any = jax.tree.structure(after), jax.tree.structure(self)
        if structures[0] != structures[1]:
            self._refuse("carries it through a loop that returns it changed")
        return after

    def read(self, reason: str = "would build the dense weight") -> jax.Array:
        if self.is_part:
            self._require_one_table()
            return self.dense()
        self._refuse(reason)

    def dense(self) -> jax.Array:
        stack, (d_in, d_out) = self.stack(), self.sides()
        matrix = dense(self.weight)
        atoms = [*stack, *d_in, *d_out]
        entries = matrix.astype(self.dtype).reshape([atom.size for atom in atoms])
        return arranged(entries, atoms, self.axes.all()).reshape(self.shape)

    def _adapted(self) -> Adapted | None:
        weight = self.weight
        while isinstance(weight, Modified | Taken):
            weight = weight.weight
        return weight if isinstance(weight, Adapted) else None

    def _each_stacked(self, change: Callable) -> "Lazy":
        def changed(leaf):
            return leaf if is_shared(leaf) else change(leaf)

        return dataclasses.replace(
            self, weight=jax.tree.map(changed, self.weight, is_leaf=is_shared)
        )

    def _explained(self, make: Callable) -> Any:
        try:
            return make()
        except ValueError as error:
            raise RefusedError(self.path, str(error), "") from error

    def _refuse(self, reason: str, first: str = "") -> NoReturn:
        ways_out = FROZEN if self._adapted() is None else ADAPTED
        raise RefusedError(self.path, reason, first + ways_out.format(path=self.path))

    def _contradict(self, reason: str) -> NoReturn:
        if self.layout == Layout():
            self._refuse(f"{reason}, but it was adapted as a stack of matrices", INFER)
        self._refuse(f"{reason}, but it was adapted as {self.layout}")
