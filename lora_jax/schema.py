"""Leaves with named axes, and what follows from the names.

A delta node or a quantised weight is a dataclass that declares each of its arrays once:

    a: jax.Array = leaf("stack in rank", mirror="b")
    b: jax.Array = leaf("stack rank out", absent=0)
    scale: jax.Array = leaf("stack", trained=False)

"stack", "in" and "out" are the groups of axes that a `Layout` names in the weight: its stacked
layers, its contracted axes, its output axes. Every other name is one axis of
the class's own, listed in its `own_axes`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lora_jax.layouts import Layout

GROUPS = ("stack", "in", "out")
_SWAPPED = {"in": "out", "out": "in"}


@flax.struct.dataclass
class Shared:
    """A value that all layers of a stack share: `scan_layers` does not slice it."""

    value: Any


def is_shared(leaf: Any) -> bool:
    return isinstance(leaf, Shared)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What a dataclass declares of one of its arrays.

    Attributes:
      axes: the names of its axes, in order; "stack" comes first or not at all.
      trained: whether an optimizer may move it.
      absent: the value with which the node adapts nothing; None where other leaves decide.
      mirror: the leaf that takes this one's place in the transposed weight's node.
      shared: whether it is inside `Shared`, and so has no stack axes.
    """

    axes: tuple[str, ...]
    trained: bool = True
    absent: float | None = None
    mirror: str | None = None
    shared: bool = False


@dataclasses.dataclass(frozen=True)
class _Declared:
    leaf: Leaf
    trained: bool | str
    nested: bool


def leaf(
    axes: str,
    *,
    trained: bool | str = True,
    absent: float | None = None,
    mirror: str | None = None,
    **field: Any,
) -> Any:
    """A dataclass field that holds an array with these axes, or None.

    Args:
      axes: names, separated by spaces.
      trained: a bool, or the name of a static field that holds it.
      absent, mirror: see `Leaf`.
      **field: of `dataclasses.field`, such as `default`.
    """
    declared = Leaf(tuple(axes.split()), absent=absent, mirror=mirror)
    return flax.struct.field(metadata={"leaf": _Declared(declared, trained, False)}, **field)


def nested(axes: str = "stack", *, trained: bool = True, **field: Any) -> Any:
    """A dataclass field that holds another such dataclass, whose leaves have `axes` in the place of
    "stack", and train only if `trained`."""
    declared = Leaf(tuple(axes.split()))
    return flax.struct.field(metadata={"leaf": _Declared(declared, trained, True)}, **field)


def static(default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field that is no leaf but part of the tree's structure."""
    return flax.struct.field(pytree_node=False, default=default)


def check_class(cls: type, own_axes: Sequence[str]) -> None:
    """Raises ValueError where a field of `cls` declares an axis that is not known."""
    for name, field in vars(cls).items():
        declared = getattr(field, "metadata", {}).get("leaf")
        for axis in declared.leaf.axes if declared else ():
            if axis not in (*GROUPS, *own_axes):
                raise ValueError(
                    f"{cls.__name__}.{name} declares an axis {axis!r}: expected one of "
                    f"{', '.join((*GROUPS, *own_axes))}. List an axis of its own in own_axes."
                )


def axes_of(cls: type) -> dict[str, tuple[str, ...]]:
    """The names of the axes of each leaf that `cls` declares."""
    found = {field.name: field.metadata.get("leaf") for field in dataclasses.fields(cls)}
    return {name: declared.leaf.axes for name, declared in found.items() if declared}


def leaves_of(node: Any) -> Any:
    """A tree like `node` with a `Leaf` in the place of each array.

    Raises:
      ValueError: for an array that the class declares no axes of.
    """
    found = {}
    for field in dataclasses.fields(node):
        if not field.metadata.get("pytree_node", True):
            continue
        value, declared = getattr(node, field.name), field.metadata.get("leaf")
        if not jax.tree.leaves(value):  # None, or what an optimizer puts for a masked leaf
            continue
        if declared is None:
            raise ValueError(
                f"{type(node).__name__}.{field.name} declares no axes: write it as "
                'leaf("stack ...").'
            )
        found[field.name] = _one_leaf(node, value, declared)
    return dataclasses.replace(node, **found)


def _one_leaf(node: Any, value: Any, declared: _Declared) -> Any:
    trains = declared.trained
    trains = getattr(node, trains) if isinstance(trains, str) else trains
    if jax.tree_util.all_leaves([value]):
        return dataclasses.replace(declared.leaf, trained=trains)
    outer = declared.leaf.axes if declared.nested else ("stack",)

    def inside(leaf: Leaf) -> Leaf:
        axes = outer + tuple(axis for axis in leaf.axes if axis != "stack")
        return dataclasses.replace(leaf, axes=axes, trained=leaf.trained and trains)

    if isinstance(value, Shared):
        shared = _one_leaf(node, value.value, declared)
        return Shared(jax.tree.map(lambda leaf: dataclasses.replace(leaf, shared=True), shared))
    return jax.tree.map(inside, leaves_of(value))


def sizes(node: Any, layout: Layout) -> dict[str, tuple[int, ...]]:
    """The dimensions of each axis, or group of axes, that the leaves of `node` have.

    Raises:
      ValueError: where two leaves disagree.
    """
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    named = jax.tree_util.tree_leaves_with_path(node)
    for (path, array), declared in zip(named, jax.tree.leaves(leaves_of(node)), strict=True):
        if declared.shared:
            continue
        name = jax.tree_util.keystr(path).lstrip(".")
        for axis, size in split(declared, tuple(jnp.shape(array)), layout):
            first, where = found.setdefault(axis, (size, name))
            if first != size:
                raise ValueError(
                    f"{type(node).__name__}: {where} has {first} along {axis!r}, {name} has {size}."
                )
    return {axis: size for axis, (size, _) in found.items()}


def split(
    declared: Leaf, shape: tuple[int, ...], layout: Layout
) -> list[tuple[str, tuple[int, ...]]]:
    """The dimensions of one leaf, by the names of its axes, in order."""
    found, place = [], 0
    for axis, count in zip(declared.axes, _counts(declared, len(shape), layout), strict=True):
        found.append((axis, shape[place : place + count]))
        place += count
    return found


def _counts(declared: Leaf, ndim: int, layout: Layout) -> list[int]:
    """How many axes of an array each name stands for; "stack" for those that are left."""
    fixed = {"in": len(layout.contracted), "out": len(layout.output), "stack": 0}
    counts = [fixed.get(axis, 1) for axis in declared.axes]
    if "stack" in declared.axes:
        counts[declared.axes.index("stack")] = ndim - sum(counts)
    return counts


def sharding_specs(
    node: Any, stack: Sequence[Any], d_in: Sequence[Any], d_out: Sequence[Any]
) -> Any:
    """A tree like `node` with the sharding spec of each array, for a weight whose groups of axes
    are sharded so. The class's own axes are replicated."""
    entries = {"stack": tuple(stack), "in": tuple(d_in), "out": tuple(d_out)}

    def spec(declared: Leaf) -> PartitionSpec:
        if declared.shared:
            return PartitionSpec()
        return PartitionSpec(*(e for axis in declared.axes for e in entries.get(axis, (None,))))

    return jax.tree.map(spec, leaves_of(node))


def local_specs(node: Any, spec: PartitionSpec, split_axes: Sequence[str]) -> Any:
    """`sharding_specs` of a matrix `[stack..., d_in, d_out]` for a shard_map.

    Raises:
      ValueError: where `spec` splits a side that is not in `split_axes`: a block of the weight does
        then not determine its own output.
    """
    *stack, d_in, d_out = spec
    for axis, entry in (("in", d_in), ("out", d_out)):
        if entry is not None and axis not in split_axes:
            raise ValueError(
                f"{type(node).__name__} needs whole matrices and cannot be split by {spec}: split "
                "none of the matrix's own axes."
            )
    return sharding_specs(node, stack, (d_in,), (d_out,))


def as_matrix(node: Any, layout: Layout) -> Any:
    """The arrays of `node` with one axis each for "in" and for "out"."""

    def joined(array: Any, declared: Leaf) -> Any:
        parts = split(declared, tuple(jnp.shape(array)), layout)
        dims = [(math.prod(size),) if axis in _SWAPPED else size for axis, size in parts]
        return array.reshape(sum(dims, ()))

    return jax.tree.map(joined, node, leaves_of(node))


def transposed(node: Any) -> Any:
    """The node of the transposed matrix: each leaf is its mirror, with "in" and "out" exchanged.

    Raises:
      ValueError: for a leaf along "in" or "out" that has no mirror.
    """
    declared = leaves_of(node)
    changed = {}
    for field in dataclasses.fields(node):
        ours = getattr(declared, field.name)
        if not isinstance(ours, Leaf) or not set(ours.axes) & set(_SWAPPED):
            continue
        if ours.mirror is None:
            raise ValueError(
                f"{type(node).__name__} cannot adapt a tied embedding, whose table the output head "
                "reads transposed: leave it out (None)."
            )
        array = getattr(node, ours.mirror)
        theirs = [_SWAPPED.get(axis, axis) for axis in getattr(declared, ours.mirror).axes]
        stack = array.ndim - len(theirs) + 1
        order = [stack - 1 + theirs.index(axis) for axis in ours.axes if axis != "stack"]
        changed[field.name] = jnp.transpose(array, [*range(stack), *order])
    return dataclasses.replace(node, **changed)


def padded(node: Any, like: Any, layout: Layout, axes: Sequence[str]) -> Any:
    """`node` with zeros after its entries along `axes`, up to the sizes of `like`."""
    wanted = sizes(like, layout)

    def grown(array: jax.Array, declared: Leaf) -> jax.Array:
        pads = []
        for axis, size in split(declared, tuple(array.shape), layout):
            if axis in axes:
                pads.append((0, wanted[axis][0] - size[0]))
            else:
                pads += [(0, 0)] * len(size)
        return jnp.pad(array, pads) if pads else array

    return jax.tree.map(grown, node, leaves_of(node))


def filled(node: Any, other: Any, layout: Layout) -> Any:
    """`node` with zeros for each optional array that only `other` has."""
    known, changed = sizes(node, layout), {}
    for name, axes in axes_of(type(node)).items():
        if getattr(node, name) is None and getattr(other, name) is not None:
            changed[name] = jnp.zeros(sum((known[axis] for axis in axes), ()), jnp.float32)
    return dataclasses.replace(node, **changed)


def without(node: Any, other: Any) -> Any:
    """`node` without the optional arrays that `other` lacks."""
    lacks = [f.name for f in dataclasses.fields(other) if getattr(other, f.name) is None]
    return dataclasses.replace(node, **dict.fromkeys(lacks))


def absent(node: Any) -> Any:
    """A node of these shapes that adapts nothing, or None if the class declares none."""
    declared = leaves_of(node)
    if all(one.absent is None for one in jax.tree.leaves(declared)):
        return None
    return jax.tree.map(lambda array, one: jnp.full_like(array, one.absent or 0), node, declared)
