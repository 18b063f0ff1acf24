"""Products of a weight that is never built dense, along the axes that the program names."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from lora_jax.adapted import Adapted
from lora_jax.layouts import Layout
from lora_jax.products import Experts
from lora_jax.tracing.applying import arranged, as_traced, over_stack
from lora_jax.tracing.axes import Atom, size_of
from lora_jax.tracing.convolving import product_of
from lora_jax.tracing.modified import Modified
from lora_jax.tracing.parts import Side, stacked
from lora_jax.tracing.tracked import Convolved, Lookup, Product, Ragged, Tracked
from lora_jax.weights import embed, linear, through, transpose


class Applied(Tracked):
    """The products of `Lazy`, whose attributes and methods it names."""

    weight: Any
    layout: Layout
    stack: Callable[[], list[Atom]]
    sides: Callable[[], tuple[list[Atom], list[Atom]]]
    _stacks: Callable[[int], bool]
    _of_one_atom: Callable[[int], tuple[Any, Atom, int]]
    _each_stacked: Callable[[Callable], Any]
    _explained: Callable[[Callable], Any]
    _contradict: Callable[[str], NoReturn]
    _refuse: Callable[..., NoReturn]

    def contract(self, x: jax.Array, product: Product) -> jax.Array:
        contracted, batch = (
            self.axes.chosen(axes) for axes in (product.w_contracted, product.w_batch)
        )
        (d_in, d_out), stack = self.sides(), self.stack()
        summed = [atom for atom in stack if atom in contracted]  # layers, whose outputs are added
        contracted = [atom for atom in contracted if atom not in summed]
        used = {atom for atom in contracted if atom.size > 1}
        forward = used <= set(d_in) if used else size_of(d_in) == 1
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
        rows = rows.reshape(*rows.shape[: len(batched) + len(free)], size_of(d_in))

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
        if not used and size_of(d_in) > 1:
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
        sizes[features : features + 1] = [
            *(a.size for a in split),
            sizes[features] // size_of(split),
        ]
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
        made: dict[int, list[Any]] = {
            convolved.out[0]: [f"x{batch}"],
            convolved.out[1]: _in(labels, outputs),
        }
        made |= {o: [f"x{i}"] for o, i in zip(convolved.out[2:], space, strict=True)}
        order = [label for place in sorted(made) for label in made[place]]
        return arranged(y, labels, order).reshape(convolved.shape)

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
        rows = rows.reshape(rows.shape[0], size_of(d_in))

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

    def rows(self, ids: jax.Array, lookup: Lookup) -> "Applied | jax.Array":
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


def _same(ours: Sequence[Atom], theirs: Sequence[Atom]) -> bool:
    return {a for a in ours if a.size > 1} == {a for a in theirs if a.size > 1}


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
        if size_of(taken) == size:
            break
        taken.append(atom)
    return taken if size_of(taken) == size else None


def _in(labels: Sequence[Any], atoms: Sequence[Atom]) -> list[Atom]:
    # Atoms of size 1 may have been dropped by a reshape.
    return [atom for atom in atoms if atom in labels]


def _precision(precision: Any) -> Any:
    """The program's precision of a product, for the products of an adapter too."""
    if isinstance(precision, tuple) and isinstance(precision[0], jax.lax.Precision):
        return jax.default_matmul_precision(precision[0].name.lower())
    return contextlib.nullcontext()
