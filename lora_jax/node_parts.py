"""Parts of a matrix's node, by the declared axes of its leaves: see `lora_jax.schema`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from lora_jax.schema import Leaf, leaves_of


def parts(node: Any, side: str, pick: Callable[[jax.Array, int], jax.Array]) -> Any:
    """A matrix's node with `pick(array, axis)`, of a negative axis, for each array along `side`."""

    def part(array: jax.Array, declared: Leaf) -> jax.Array:
        if declared.shared or side not in declared.axes:
            return array
        return pick(array, declared.axes.index(side) - len(declared.axes))

    return jax.tree.map(part, node, leaves_of(node))


def restacked(node: Any, move: Callable[[jax.Array, Sequence[str]], jax.Array]) -> Any:
    """A matrix's node with `move(array, names)` for each array `[stack..., names...]`."""

    def moved(array: jax.Array, declared: Leaf) -> jax.Array:
        names = [axis for axis in declared.axes if axis != "stack"]
        return array if declared.shared else move(array, names)

    return jax.tree.map(moved, node, leaves_of(node))


def by_rows(node: Any, experts: jax.Array) -> Any:
    """A node stacked over experts `[g, ...]` for rows that each have one of `experts [m]`: vectors
    become `[m, ...]`, scalars `[m, 1]`, and matrices keep their axis of experts."""

    def rows(array: jax.Array, declared: Leaf) -> jax.Array:
        if declared.shared or len(declared.axes) > 2:
            return array
        picked = array[experts]
        return picked if len(declared.axes) == 2 else picked[:, None]

    return jax.tree.map(rows, node, leaves_of(node))
