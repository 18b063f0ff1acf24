"""Entries of a delta that belong to no weight, prompts and prefixes: their paths in the tree of
weights, and what a model reads there."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.methods.method import Method
from lora_jax.nodes import Extra, rows_behind_layers


def inserted(tree: Any, parts: list[str], value: Any) -> Any:
    """The tree of nested dicts with one more leaf, at the path of these parts."""
    if not isinstance(tree, dict):
        raise ValueError(
            f"{'/'.join(parts)} is a parameter that the model reads by itself, and only nested "
            f"dicts can take one; found {type(tree).__name__}."
        )
    first, *rest = parts
    return {**tree, first: inserted(tree.get(first, {}), rest, value) if rest else value}


def require_free(path: str, extra: Extra, taken: Iterable[str]) -> None:
    """Raises ValueError where `taken`, the paths of the params, have a leaf at this path."""
    if found := next((p for p in taken if p == path or p.startswith(f"{path}/")), None):
        raise ValueError(
            f"{path}: a {type(extra).__name__} of the delta has its place there, where the params "
            f"have a leaf of their own, {found!r}. Rename that leaf, or leave the method out."
        )


def require_one(path: str, extra: Extra, first: Method | None, second: Method) -> None:
    """Raises ValueError where the method `first` already has an extra at this path."""
    if first is not None:
        raise ValueError(
            f"{path}: both {first} and {second} put a {type(extra).__name__} there, and a model "
            "reads one. Drop one of the two."
        )


def bound(extra: Extra, adapter_ids: jax.Array | None) -> Extra:
    """What a model reads of an extra: of a stack of adapters, the one of each batch row,
    `[layers..., B]`."""
    if adapter_ids is None:
        return extra.bound()
    each = jax.vmap(lambda adapter: adapter.bound())(extra)
    layers = each.stack_ndim - 1
    each = rows_behind_layers(each, layers)
    return jax.tree.map(lambda leaf: jnp.take(leaf, adapter_ids, axis=layers), each)
