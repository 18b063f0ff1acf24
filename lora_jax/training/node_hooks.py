"""What the methods of a delta's nodes add to a step, as their classes declare it."""

from typing import Any, cast

import jax

from lora_jax.nodes import DeltaNode
from lora_jax.transform import Delta


def penalty(delta: Delta) -> jax.Array | None:
    """What `DeltaNode.penalty` of all classes adds to the mean loss; None for nothing at all."""
    nodes = jax.tree.leaves(delta, is_leaf=_is_node)
    terms = [
        node_class.penalty([nodes[i] for i in at]) for node_class, at in _by_class(nodes).items()
    ]
    found = [term for term in terms if term is not None]
    return sum(found[1:], start=found[0]) if found else None


def after_update(delta: Delta, gradients: Delta, step: jax.Array) -> Delta:
    """The delta after the optimizer, as `DeltaNode.after_update` of each class returns it."""
    nodes, treedef = jax.tree.flatten(delta, is_leaf=_is_node)
    slopes = cast(Any, treedef).flatten_up_to(gradients)
    for node_class, at in _by_class(nodes).items():
        moved = node_class.after_update([nodes[i] for i in at], [slopes[i] for i in at], step)
        for i, node in zip(at, moved, strict=True):
            nodes[i] = node
    return jax.tree.unflatten(treedef, nodes)


def _by_class(nodes: list[Any]) -> dict[type[DeltaNode], list[int]]:
    """The indices of the nodes of each class."""
    groups: dict[type[DeltaNode], list[int]] = {}
    for i, node in enumerate(nodes):
        if isinstance(node, DeltaNode):
            groups.setdefault(type(node), []).append(i)
    return groups


def _is_node(leaf: Any) -> bool:
    return isinstance(leaf, DeltaNode)
