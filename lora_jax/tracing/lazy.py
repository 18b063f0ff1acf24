"""A weight that is applied and never built dense, wherever the program moves its axes."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lora_jax.adapted import Adapted
from lora_jax.layouts import Layout
from lora_jax.products import Experts
from lora_jax.tracing.applying import arranged, as_traced, over_stack
from lora_jax.tracing.axes import Atom, Axes
from lora_jax.tracing.convolving import product_of
from lora_jax.tracing.modified import Modified
from lora_jax.tracing.parts import Pick, Side, Taken, part_of, stacked
from lora_jax.tracing.tracked import Convolved, Lookup, Product, Ragged, RefusedError, Tracked
from lora_jax.weights import (
    Weight,
    as_matrix,
    cast,
    dense,
    embed,
    is_shared,
    linear,
    through,
    transpose,
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
class Lazy(Tracked):
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
        rows = self.rows(jnp.asarray(picked), Lookup(axis, tuple(range(1, len(self.shape)))))
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
            sizes.insert(place, _size(atoms))
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
        atom = dataclasses.replace(min(atoms), size=_size(atoms))
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

    def contract(self, x: jax.Array, product: Product) -> jax.Array:
        contracted, batch = (
            self.axes.chosen(axes) for axes in (product.w_contracted, product.w_batch)
        )
        (d_in, d_out), stack = self.sides(), self.stack()
        summed = [atom for atom in stack if atom in contracted]  # layers, whose outputs are added
        contracted = [atom for atom in contracted if atom not in summed]
        forward = _within(contracted, d_in)
        if not forward:
            d_in, d_out = d_out, d_in
        value = self._with_layers(forward, d_in, d_out, contracted, batch)
        if value is None:
            self._contradict(f"contracts the axes {product.w_contracted} of its shape {self.shape}")
        weight, d_in, d_out, stack = value
        meets = dict(zip(product.x_contracted, product.w_contracted, strict=True))
        meets |= dict(zip(product.x_batch, product.w_batch, strict=True))
        x_labels = [self.axes.atoms[meets[i]] if i in meets else (i,) for i in range(x.ndim)]
        free = [i for i in range(x.ndim) if i not in meets]
        along = [atom in batch or atom in summed for atom in stack]

        labels = [label for group in x_labels for label in group]
        sizes = [label.size if isinstance(label, Atom) else x.shape[label] for label in labels]
        batched = [atom for atom, mapped in zip(stack, along, strict=True) if mapped]
        rows = arranged(x.reshape(sizes), labels, [*batched, *free, *_in(labels, d_in)])
        rows = rows.reshape(*rows.shape[: len(batched) + len(free)], _size(d_in))

        def apply(weight, rows):
            return linear(rows, weight if forward else transpose(weight))

        weight = as_traced(weight, x.dtype, product.precision, product.dtype)
        with _precision(product.precision):
            y = self._explained(
                lambda: over_stack(apply, weight, rows.astype(product.dtype), along)
            )
        if summed:
            y = jnp.sum(y.astype(jnp.float32), [stack.index(atom) for atom in summed])
            stack = [atom for atom in stack if atom not in summed]
        y = y.astype(product.dtype).reshape(*y.shape[:-1], *(atom.size for atom in d_out))
        labels = [*stack, *free, *d_out]
        ours = _in(labels, self.axes.without((*product.w_contracted, *product.w_batch)).all())
        batch = _in(labels, batch)
        order = [*batch, *ours, *free] if product.w_first else [*batch, *free, *ours]
        return arranged(y, labels, order).reshape(product.shape)

    def _with_layers(self, forward, d_in, d_out, contracted, batch) -> Any:
        """`(weight, d_in, d_out, stack)` where parts of a side that a product does not contract, or
        that run along with its batch, are stack axes; None where there is no such form."""
        stack, stays = self.stack(), [atom for atom in d_in if atom not in contracted]
        moves = [atom for atom in stays if atom.size > 1]
        moves += [atom for atom in batch if atom in d_out and atom.size > 1]
        known = {*stack, *moves}
        used = {atom for atom in contracted if atom.size > 1}
        if not used <= set(d_in) or not {a for a in batch if a.size > 1} <= known:
            return None
        if not moves:
            return self.weight, d_in, d_out, stack
        if not used:
            return None
        sides = [
            Side(tuple(a.size for a in side), tuple(a in moves for a in side))
            for side in ((d_in, d_out) if forward else (d_out, d_in))
        ]
        weight = stacked(self.weight, len(stack), *sides)
        if weight is None:
            return None
        order = (*d_in, *d_out) if forward else (*d_out, *d_in)
        stack = [*stack, *(atom for atom in order if atom in moves)]
        left = ([atom for atom in side if atom not in moves] for side in (d_in, d_out))
        return weight, *left, stack

    def convolve(self, x: jax.Array, convolved: Convolved) -> jax.Array:
        (d_in, d_out), stack = self.sides(), self.stack()
        outputs = [atom for atom in self.axes.atoms[convolved.w[0]] if atom.size > 1]
        inputs = self.axes.chosen(convolved.w[1:])
        layers = [atom for atom in outputs if atom in stack]
        forward = _same(inputs, d_in)
        if not forward:
            d_in, d_out = d_out, d_in
        fits = _same(inputs, d_in) and _same([a for a in outputs if a not in layers], d_out)
        if not fits or not _same(layers, stack):
            self._contradict(f"convolves with axes {convolved.w[1:]} of its shape {self.shape}")
        split = _leading(layers, convolved.groups)
        if split is None or outputs[: len(split)] != split:
            self._contradict(f"convolves with it in {convolved.groups} groups")

        batch, features, *space = convolved.x
        labels: list[Any] = list(range(x.ndim))
        labels[features : features + 1] = [*split, features]
        sizes = list(x.shape)
        sizes[features : features + 1] = [*(a.size for a in split), sizes[features] // _size(split)]
        rest = [batch, *(i for i in range(x.ndim) if i != batch)]
        along = [atom in split for atom in stack]
        order = [*(atom for atom in stack if atom in split), *rest]
        x = arranged(x.reshape(sizes), labels, order)
        product = product_of(convolved, self.axes.atoms, d_in)

        def apply(weight, x):
            return through(product, x, weight if forward else transpose(weight))

        y = self._explained(lambda: over_stack(apply, self.weight, x, along))
        y = y.reshape(*y.shape[:-1], *(atom.size for atom in d_out))
        labels = [*stack, *(f"x{i}" for i in (batch, *space)), *d_out]
        made: list[Any] = [None] * x.ndim
        made = {convolved.out[0]: [f"x{batch}"], convolved.out[1]: _in(labels, outputs)}
        made |= {o: [f"x{i}"] for o, i in zip(convolved.out[2:], space, strict=True)}
        order = [label for place in sorted(made) for label in made[place]]
        return arranged(y, labels, order).reshape(convolved.shape)

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
        vector = vector.reshape(*(a.size for a in stack), _size(side))
        made = {"rows" if side is d_in else "columns": vector}
        return dataclasses.replace(self, weight=Modified(self.weight, **made))

    def filled(self, within: jax.Array, fill: float, axes: Sequence[int]) -> "Lazy":
        stack, ids = self.stack(), self.axes.chosen(axes)
        present = arranged(within, ids, [atom for atom in stack if atom in ids])
        present = present.reshape([atom.size if atom in ids else 1 for atom in stack])
        present = jnp.broadcast_to(present, [atom.size for atom in stack])
        weight = Modified(self.weight, present=present, fill=fill)
        return dataclasses.replace(self, weight=weight)

    def by_expert(self, x: jax.Array, sizes: jax.Array, ragged: Ragged) -> jax.Array:
        (d_in, d_out), stack = self.sides(), self.stack()
        contracted = self.axes.chosen(ragged.w_contracted)
        forward = _same(contracted, d_in)
        if not forward:
            d_in, d_out = d_out, d_in
        if not _same(contracted, d_in) or not _same(self.axes.atoms[ragged.w_expert], stack):
            self._contradict(f"has its experts along axis {ragged.w_expert} of {self.shape}")
        value, _, _ = self._of_one_atom(ragged.w_expert)
        meets = dict(zip(ragged.x_contracted, ragged.w_contracted, strict=True))
        groups = [self.axes.atoms[meets[i]] if i in meets else ("row",) for i in range(x.ndim)]
        labels = [label for group in groups for label in group]
        sizes_of = [a.size if isinstance(a, Atom) else x.shape[ragged.x_row] for a in labels]
        rows = arranged(x.reshape(sizes_of), labels, ["row", *_in(labels, d_in)])
        rows = rows.reshape(rows.shape[0], _size(d_in))

        has_expert = jnp.arange(rows.shape[0], dtype=jnp.int32) < jnp.sum(sizes)

        def apply():
            if isinstance(value.weight, Modified):
                self._refuse("multiplies or fills the experts of a product by group sizes")
            weight = value.weight if forward else transpose(value.weight)
            if isinstance(weight, Adapted):
                experts = jnp.arange(sizes.shape[0], dtype=jnp.int32)
                weight = weight.by_rows(
                    jnp.repeat(experts, sizes, total_repeat_length=rows.shape[0])
                )
            return through(Experts(ragged.run, (sizes,), has_expert), rows, weight)

        y = self._explained(apply)
        y = y.reshape(y.shape[0], *(atom.size for atom in d_out))
        others = self.axes.without((ragged.w_expert, *ragged.w_contracted))
        y = arranged(y, ["row", *d_out], ["row", *_in(d_out, others.all())])
        return y.reshape(y.shape[0], *others.shape)

    def rows(self, ids: jax.Array, lookup: Lookup) -> "Lazy | jax.Array":
        if self._stacks(lookup.axis):
            value, _, place = self._of_one_atom(lookup.axis)
            axes = value.axes.looked_up(lookup.axis, ids.shape, lookup.offset_dims)
            return dataclasses.replace(value, axes=axes)._each_stacked(
                lambda leaf: jnp.take(leaf, ids, axis=place, mode="clip")
            )
        (d_in, d_out), stack = self.sides(), self.stack()
        looked = self.axes.atoms[lookup.axis]
        forward = _same(looked, d_in)
        if not forward:
            d_in, d_out = d_out, d_in
        if not _same(looked, d_in):
            self._contradict(f"looks up entries along axis {lookup.axis} of its shape {self.shape}")
        ids = _reordered(ids, looked, d_in)

        def apply(weight, ids):
            return embed(ids, weight if forward else transpose(weight))

        y = self._explained(lambda: over_stack(apply, self.weight, ids, [False] * len(stack)))
        y = y.astype(self.dtype).reshape(*y.shape[:-1], *(atom.size for atom in d_out))
        others = self.axes.without((lookup.axis,))
        labels = [*stack, *range(ids.ndim), *d_out]
        y = arranged(y, labels, [*range(ids.ndim), *_in(labels, others.all())])
        y = y.reshape(*ids.shape, *others.shape)
        places = range(ids.ndim, y.ndim)
        return jnp.moveaxis(y, places, lookup.offset_dims)

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


def _same(ours: Sequence[Atom], theirs: Sequence[Atom]) -> bool:
    return {a for a in ours if a.size > 1} == {a for a in theirs if a.size > 1}


def _within(ours: Sequence[Atom], theirs: Sequence[Atom]) -> bool:
    return {a for a in ours if a.size > 1} <= {a for a in theirs if a.size > 1}


def _reordered(ids: jax.Array, looked: Sequence[Atom], d_in: Sequence[Atom]) -> jax.Array:
    """Ids along an axis of the atoms `looked` as ids of the matrix's rows, which are `d_in`."""
    ours, rows = ([atom for atom in atoms if atom.size > 1] for atoms in (looked, d_in))
    if ours == rows:
        return ids
    each = dict(zip(ours, jnp.unravel_index(ids, [atom.size for atom in ours]), strict=True))
    row = jnp.zeros_like(ids)
    for atom in rows:
        row = row * atom.size + each[atom]
    return row


def _leading(atoms: Sequence[Atom], size: int) -> list[Atom] | None:
    """The first of these atoms that together have this size; None where there are none."""
    taken: list[Atom] = []
    for atom in atoms:
        if _size(taken) == size:
            break
        taken.append(atom)
    return taken if _size(taken) == size else None


def _size(atoms: Sequence[Atom]) -> int:
    return math.prod(atom.size for atom in atoms)


def _in(labels: Sequence[Any], atoms: Sequence[Atom]) -> list[Atom]:
    # Atoms of size 1 may have been dropped by a reshape.
    return [atom for atom in atoms if atom in labels]


def _precision(precision: Any) -> Any:
    """The program's precision of a product, for the products of an adapter too."""
    if isinstance(precision, tuple) and isinstance(precision[0], jax.lax.Precision):
        return jax.default_matmul_precision(precision[0].name.lower())
    return contextlib.nullcontext()
