"""Converts between nodes, whose leaves stack layers, and the tensors of modules, one layer each.

A tensor of PEFT is a layer's leaf with its axes reversed: a matrix transposed, a vector unchanged.
Its shape follows from the axes that the node's class declares.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import schema
from lora_jax.interop.peft.model import Model, Tensors
from lora_jax.interop.peft.names import Slot

Leaves = Mapping[str, Any]


def layer_of(node: Any, slot: Slot) -> Any:
    """The node of one layer, as a matrix's."""
    node = node.as_matrix()
    return node if slot.layer is None else jax.tree.map(lambda leaf: leaf[slot.layer], node)


def linear_layers(nodes: Mapping[str, Any], model: Model) -> Iterator[tuple[Slot, Any]]:
    """Each module and its layer of the node, for a type that PEFT has for linear layers only.

    Raises:
      ValueError: for the embedding table.
    """
    for slot in model.slots_at(nodes):
        if slot.is_embedding:
            raise ValueError(
                f"{slot.path}: PEFT has no {type(nodes[slot.path]).__name__.removesuffix('Node')} "
                "of an embedding table. Leave it out, or merge the adapter and export the merged "
                "model."
            )
        yield slot, layer_of(nodes[slot.path], slot)


def as_tensors(node: Any, names: Mapping[str, str]) -> Tensors:
    """The tensors of one layer; `names` are PEFT's, by our leaf."""
    return {name: np.asarray(getattr(node, leaf)).T for leaf, name in names.items()}


def adapted_layers(
    modules: Mapping[str, Tensors], model: Model
) -> Iterator[tuple[str, dict[Slot, Tensors]]]:
    """Each path that has tensors, with its layers and their tensors, which `take` removes."""
    for path, slots in model.by_path().items():
        if found := {slot: dict(modules[slot.module]) for slot in slots if slot.module in modules}:
            yield path, found


def take(
    model: Model, slot: Slot, given: Tensors, name: str, shape: tuple[int | None, ...]
) -> np.ndarray:
    """Removes a module's tensor from `given`.

    Raises:
      ValueError: if it is missing or of another shape; None in `shape` is any size.
    """
    if name not in given:
        raise ValueError(f"{model.source} lacks {slot.module}.{name}.")
    tensor = given.pop(name)
    fits = len(tensor.shape) == len(shape) and all(
        size in (None, found) for size, found in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{model.source}: {slot.module}.{name} has shape {tensor.shape}, expected "
            f"{tuple('r' if size is None else size for size in shape)}. Is it an adapter of this "
            "base?"
        )
    return np.asarray(tensor, np.float32)


def take_leaves(
    model: Model, slot: Slot, given: Tensors, kind: type, names: Mapping[str, str], **sizes: int
) -> dict[str, np.ndarray]:
    """Removes from `given` the tensors of a layer of a node of class `kind`: `{leaf: array}`.

    Args:
      names: PEFT's, by our leaf.
      **sizes: of axes of the class's own.

    Raises:
      ValueError: as `take`, and for a tensor that is left.
    """
    axes, found = schema.axes_of(kind), {}
    known = {"in": slot.d_in, "out": slot.d_out, **sizes}
    for leaf, name in names.items():
        own = [axis for axis in axes[leaf] if axis != "stack"]
        shape = tuple(known.get(axis) for axis in reversed(own))
        found[leaf] = take(model, slot, given, name, shape).T
        known |= zip(own, found[leaf].shape, strict=True)
    refuse_rest(model, slot, given)
    return found


def refuse_rest(model: Model, slot: Slot, given: Tensors, also: tuple[str, ...] = ()) -> None:
    """Raises ValueError for tensors of a module that are left."""
    if rest := sorted(given.keys() - set(also)):
        raise ValueError(
            f"{model.source}: {slot.module} has {', '.join(rest)}, which an adapter of this type "
            "has no place for."
        )


def stacked(
    model: Model, path: str, kind: type, layers: Mapping[Slot, Leaves], /, **settings: Any
) -> Any:
    """The node of class `kind` at a path, of the leaves of its layers, each a matrix's.

    A layer without leaves gets zeros, and so does the end of one that is shorter along an axis of
    the class's own.

    Args:
      layers: the same leaves of each.
      **settings: the node's other fields.
    """
    stack, d_in, d_out = model.dims(path)
    groups, axes, found = {"in": d_in, "out": d_out}, schema.axes_of(kind), {}
    for name in next(iter(layers.values())):
        arrays = {slot.layer or 0: np.asarray(leaves[name]) for slot, leaves in layers.items()}
        widest = tuple(map(max, zip(*(array.shape for array in arrays.values()), strict=True)))
        filled = np.zeros((*(stack or (1,)), *widest), np.float32)
        for i, array in arrays.items():
            place: Any = (i, *(slice(size) for size in array.shape))
            filled[place] = array
        own = (axis for axis in axes[name] if axis != "stack")
        sizes = (groups.get(axis, (size,)) for axis, size in zip(own, widest, strict=True))
        found[name] = jnp.asarray(filled.reshape((*stack, *sum(sizes, ()))))
    return kind(**found, layout=model.layout(path), **settings)
