"""The shardings of a base, a delta, a train state and a batch on a mesh."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax import paths
from lora_jax.context_mesh import ARMS, FSDP, SEQUENCE
from lora_jax.methods import Extra
from lora_jax.parallel.rules import Specs
from lora_jax.training.losses.fields import POSITIONS, ROWS, Fields
from lora_jax.transform import Delta, delta_nodes
from lora_jax.weights import PyTree, is_weight

ALONG = {ROWS: FSDP, POSITIONS: SEQUENCE}  # the axis of a mesh that splits an axis of a batch


def base_shardings(mesh: Mesh, base: PyTree, specs: Specs) -> PyTree:
    """A tree like `base`, quantised weights included, with the sharding of each array.

    Raises:
      ValueError: naming the path, for an axis that the mesh does not divide.
    """

    flat = paths.flatten(base, is_leaf=is_weight)
    found = [leaf_sharding(mesh, path, leaf, specs[path]) for path, leaf in flat.items()]
    return jax.tree.unflatten(jax.tree.structure(base, is_leaf=is_weight), found)


def leaf_sharding(mesh: Mesh, path: str, leaf: Any, spec: PartitionSpec) -> Any:
    """What `base_shardings` returns for one array or weight."""
    with paths.naming(path):
        specs = leaf.sharding_specs(spec) if is_weight(leaf) else spec
    return _shardings(mesh, path, leaf, specs)


def delta_shardings(mesh: Mesh, delta: Delta, specs: Specs, *, arms: bool = False) -> Delta:
    """A tree like `delta` with the sharding of each array, derived from those of its weights: A
    follows the contracted axis of a weight, B its output axis, and axes of rank are replicated.

    Args:
      mesh: the mesh.
      delta: of one arm, or with a leading axis of `arms`.
      specs: those of the base's leaves.

    Raises:
      ValueError: naming the path, for an axis that the mesh does not divide.
    """

    def of_node(path, node):
        if isinstance(node, Extra):
            found = jax.tree.map(lambda _: PartitionSpec(), node)
        else:
            found = node.sharding_specs(specs[path])
        if arms:
            found = jax.tree.map(lambda spec: PartitionSpec(ARMS, *spec), found, is_leaf=_is_spec)
        return _shardings(mesh, path, node, found)

    return paths.nest({path: of_node(path, node) for path, node in delta_nodes(delta).items()})


def state_shardings(mesh: Mesh, state: Any, specs: Specs, *, arms: bool = False) -> Any:
    """A tree like a train state, which has a `delta`. Whatever mirrors the delta's leaves, as
    Adam's moments do, is sharded as they are; all else, such as Adafactor's statistics of rows and
    columns, is replicated."""
    of_delta = delta_shardings(mesh, state.delta, specs, arms=arms)
    shapes = jax.tree_util.tree_leaves_with_path(jax.tree.map(jnp.shape, state.delta), _is_shape)
    known = {
        tuple(path): (shape, sharding)
        for (path, shape), sharding in zip(shapes, jax.tree.leaves(of_delta), strict=True)
    }
    rest = NamedSharding(mesh, PartitionSpec(*[ARMS] * arms))

    def of_leaf(path, leaf):
        for start in range(len(path)):
            shape, sharding = known.get(tuple(path[start:]), (None, rest))
            if shape == jnp.shape(leaf):
                return sharding
        return rest

    return jax.tree_util.tree_map_with_path(of_leaf, state)


def batch_sharding(mesh: Mesh, axes: str = "rows positions") -> NamedSharding:
    """The sharding of an array of a batch with these axes, named as in a loss's `Field`."""
    return NamedSharding(mesh, PartitionSpec(*map(ALONG.get, axes.split())))


def require_divisible(mesh: Mesh, batch: Mapping[str, Any], fields: Fields) -> None:
    """Raises ValueError unless the mesh divides the rows and positions of a batch."""
    for name, field in fields.items():
        for what, count in zip(field.names, batch[name].shape, strict=True):
            axis = ALONG.get(what)
            if axis and count % mesh.shape[axis]:
                raise ValueError(
                    f"a batch of {count} {what} cannot be split over {axis}={mesh.shape[axis]}: "
                    f"choose a multiple of {mesh.shape[axis]}, or a mesh with fewer devices along "
                    f"{axis}."
                )


def _shardings(mesh: Mesh, path: str, tree: Any, specs: Any) -> Any:
    def of_leaf(leaf, spec):
        for size, entry in zip(leaf.shape, spec, strict=False):
            axes = entry if isinstance(entry, tuple) else (entry,) if entry else ()
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if size % parts:
                raise ValueError(
                    f"{path}: an axis of {size} cannot be split over the {parts} devices of "
                    f"{' x '.join(f'{axis}={mesh.shape[axis]}' for axis in axes)}. Choose a mesh "
                    "that divides it, or a rule that replicates it"
                    + (", or smaller blocks: they are not cut." if is_weight(tree) else ".")
                )
        return NamedSharding(mesh, spec)

    return jax.tree.map(of_leaf, tree, specs)


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and all(isinstance(size, int) for size in leaf)


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)
