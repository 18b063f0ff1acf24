"""A plain array that records which of its leaf's axes a program contracts, stacks or gains."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.layouts import Layout
from lora_jax.tracing import plain
from lora_jax.tracing.axes import Atom, Axes
from lora_jax.tracing.tracked import Convolved, Lookup, Product, Ragged, Tracked


@dataclasses.dataclass(frozen=True)
class Use:
    """One product or lookup of a leaf, or one reading of its layers, in its own axes.

    Attributes:
      contracted, output: atoms of the leaf; its other axes are stacked here.
      lookup: whether it was an embedding's lookup.
      layers: atoms along which entries are sliced, scanned or run along with an activation's.
      groups: of a convolution, those that no axis of the leaf runs along.
      read: whether the plain array was read, for an equation without a rule.
      inside: the equation and those around it, outermost first, each with its jaxpr.
    """

    contracted: tuple[Atom, ...] = ()
    output: tuple[Atom, ...] = ()
    lookup: bool = False
    layers: tuple[Atom, ...] = ()
    groups: int = 1
    read: bool = False
    inside: tuple[tuple[Any, Any], ...] = ()


class Uses:
    """What a program does with each leaf, noted while the program is walked.

    Attributes:
      of: `{path: uses}`.
    """

    def __init__(self) -> None:
        self.of: dict[str, list[Use]] = {}
        self._inside: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def within(self, jaxpr: Any, eqn: Any) -> Iterator[None]:
        self._inside.append((jaxpr, eqn))
        try:
            yield
        finally:
            self._inside.pop()

    def note(self, path: str, use: Use) -> None:
        self.of[path].append(dataclasses.replace(use, inside=tuple(self._inside)))


@flax.struct.dataclass
class Probe(Tracked):
    """The array itself, which notes each use in `uses`."""

    value: jax.Array
    path: str = flax.struct.field(pytree_node=False)
    axes: Axes = flax.struct.field(pytree_node=False)
    uses: Uses = flax.struct.field(pytree_node=False)
    table: tuple[tuple[Atom, ...], tuple[Atom, ...]] | None = flax.struct.field(
        pytree_node=False, default=None
    )

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    def within(self, jaxpr: Any, eqn: Any) -> AbstractContextManager[None]:
        return self.uses.within(jaxpr, eqn)

    def moved(self, axes: Axes, move: Callable) -> "Probe":
        return dataclasses.replace(self, value=move(self.value), axes=axes)

    def cast(self, dtype: Any) -> "Probe":
        return dataclasses.replace(self, value=self.value.astype(dtype))

    def each(self, change: Callable) -> "Probe":
        return dataclasses.replace(self, value=change(self.value))

    def window(self, axis: int, picked: jax.Array | np.ndarray) -> "Probe":
        self._note(layers=self.axes.atoms[axis])
        sizes = (len(picked), *(1 for _ in self.axes.atoms[axis][1:]))
        atoms = zip(self.axes.atoms[axis], sizes, strict=False)
        resized = tuple(dataclasses.replace(atom, size=size) for atom, size in atoms)
        return dataclasses.replace(
            self,
            value=jnp.take(self.value, picked, axis=axis),
            axes=self.axes.replaced(axis, resized),
        )

    def scanned(self) -> tuple[Any, Callable]:
        self._note(layers=self.axes.atoms[0])
        inner = self.axes.without((0,))
        return self.value, lambda value: dataclasses.replace(self, value=value, axes=inner)

    def sharded(self, spec: Sequence[Any], blocks: Callable) -> tuple[Any, Any, Callable]:
        axes = self.axes.resized(lambda axis, atom: atom.size // blocks(spec[axis]))
        return (
            self.value,
            jax.sharding.PartitionSpec(*spec),
            lambda value: dataclasses.replace(self, value=value, axes=axes),
        )

    def contract(self, x: jax.Array, product: Product) -> jax.Array:
        gained = self.axes.without((*product.w_contracted, *product.w_batch))
        layers = self.axes.chosen(product.w_batch)
        self._note(self.axes.chosen(product.w_contracted), gained.all(), layers=layers)
        return product.of_arrays(x, self.value)

    def convolve(self, x: jax.Array, convolved: Convolved) -> jax.Array:
        outputs = list(self.axes.atoms[convolved.w[0]])
        layers, groups = [], convolved.groups
        while len(outputs) > 1 and groups > 1 and groups % outputs[0].size == 0:
            if outputs[0].axis == outputs[-1].axis:
                break
            groups //= outputs[0].size
            layers.append(outputs.pop(0))
        use = Use(
            tuple(self.axes.chosen(convolved.w[1:])), tuple(outputs), False, tuple(layers), groups
        )
        self.uses.note(self.path, use)
        return convolved.run(x, self.value, convolved.groups)

    def multiplied(self, factor: jax.Array) -> "Probe | jax.Array":
        sides = {atom.axis for atom in self.axes.all() if atom.size > 1}
        varying = [i for i, size in enumerate(factor.shape) if size > 1]
        if sides <= {atom.axis for atom in self.axes.chosen(varying)}:  # such as a norm's scale
            return self.read() * factor
        return dataclasses.replace(self, value=self.value * factor)

    def by_expert(self, x: jax.Array, sizes: jax.Array, ragged: Ragged) -> jax.Array:
        gained = self.axes.without((ragged.w_expert, *ragged.w_contracted)).all()
        experts = self.axes.atoms[ragged.w_expert]
        self._note(self.axes.chosen(ragged.w_contracted), gained, layers=experts)
        return ragged.run_as_traced(x, self.value, sizes)

    def rows(self, ids: jax.Array, lookup: Lookup) -> "Probe | jax.Array":
        rows, looked = self._rows(ids, lookup), self.axes.atoms[lookup.axis]
        gained = self.axes.without((lookup.axis,)).all()
        if len(looked) != 1 or len({atom.axis for atom in gained if atom.size > 1}) < 2:
            self._note(looked, gained, lookup=True)
            return rows
        self._note(layers=looked)  # matrices: a stack of layers, unless they are read as they are
        axes = self.axes.looked_up(lookup.axis, ids.shape, lookup.offset_dims)
        return dataclasses.replace(self, value=rows, axes=axes, table=(looked, tuple(gained)))

    def filled(self, within: jax.Array, fill: float, axes: Sequence[int]) -> "Probe":
        del within, fill, axes  # of the values, which nobody reads
        return self

    def _rows(self, ids: jax.Array, lookup: Lookup) -> jax.Array:
        rows = jnp.take(self.value, ids, axis=lookup.axis)
        places = [lookup.axis + i for i in range(ids.ndim)]
        rows = jnp.moveaxis(rows, places, range(ids.ndim))
        return jnp.moveaxis(rows, range(ids.ndim, rows.ndim), lookup.offset_dims)

    def carried(self, after: Any) -> "Probe":
        return dataclasses.replace(self, value=plain.dense(after))

    def read(self, reason: str = "") -> jax.Array:
        del reason
        if self.table:
            self._note(*self.table, lookup=True)
        else:
            self.uses.note(self.path, Use(read=True))
        return self.value

    def dense(self) -> jax.Array:
        return self.value

    def _note(
        self,
        contracted: Sequence[Atom] = (),
        output: Sequence[Atom] = (),
        *,
        lookup: bool = False,
        layers: Sequence[Atom] = (),
    ) -> None:
        self.uses.note(self.path, Use(tuple(contracted), tuple(output), lookup, tuple(layers)))


def layout_of(path: str, shape: tuple[int, ...], uses: Sequence[Use]) -> Layout | None:
    """The one layout that serves all uses of a leaf; None where nothing is contracted with it.

    Raises:
      ValueError: where two uses factor the leaf in different ways.
    """
    lookups_first = sorted(uses, key=lambda use: not use.lookup)
    layers = {atom.axis for use in uses for atom in use.layers}
    roles = [pair for use in lookups_first if (pair := _roles(path, shape, use, layers))]
    if not roles:
        return None
    contracted, output = roles[0]
    for other in roles:
        if other not in ((contracted, output), (output, contracted)):
            raise ValueError(
                f"{path}, of shape {tuple(shape)}, is used as two different matrices: "
                f"{Layout(contracted, output)} and {Layout(other[0], other[1])}. No factors serve "
                "both: leave the path out."
            )
    groups = {use.groups for use in uses if use.contracted and use.output}
    if len(groups) > 1:
        raise ValueError(
            f"{path}, of shape {tuple(shape)}, is convolved with in {min(groups)} groups and in "
            f"{max(groups)}. No factors serve both: leave the path out."
        )
    gathered = any(use.lookup for use in uses)
    return Layout(contracted, output, gathered=gathered, groups=groups.pop())


def _roles(
    path: str, shape: tuple[int, ...], use: Use, layers: set[int]
) -> tuple[tuple[int, ...], ...] | None:
    """The leaf's contracted and output axes in one use; None where one side has none. `layers` are
    the axes of which some use reads parts: stacked, unless the side has no others."""
    contracted, output = ({atom.axis for atom in atoms} for atoms in (use.contracted, use.output))
    if both := contracted & output:
        output -= both  # parts of the contracted side, which a product runs along
    if both and not output:
        raise ValueError(
            f"{path}, of shape {tuple(shape)}, has an axis ({', '.join(map(str, sorted(both)))}) "
            "of which one part is contracted and another is not. No factors serve that: leave the "
            "path out."
        )
    if not (contracted and output):
        return None
    matrix = [
        side - layers if any(shape[axis] > 1 for axis in side - layers) else side
        for side in (contracted, output)
    ]
    return tuple(sorted(matrix[0])), tuple(sorted(matrix[1]))
