"""What a delta leaves frozen, and why."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lora_jax import paths
from lora_jax.layouts import Layout
from lora_jax.targets import PRESETS, Match, guessed_layout, is_embedding_or_head, is_head
from lora_jax.transform import layout_of, misfit

Given = Mapping[str, Layout | None]
_NUMBER = re.compile(r"(?<![^/_])\d+(?![^/])")  # a component of a path, or its end


@dataclasses.dataclass(frozen=True)
class FrozenRow:
    """One path that is not adapted: its shape, its parameters, and the reason."""

    path: str
    shape: tuple[int, ...]
    params: int
    reason: str


def frozen_rows(
    leaves: Mapping[str, Any], adapted: set[str], matches: Mapping[str, Match], layouts: Given
) -> list[FrozenRow]:
    """A row for each array of `leaves` that is not `adapted`.

    Args:
      leaves: `{path: leaf}`.
      adapted: the paths with a delta node.
      matches: by path, what the rules pick, those that are mapped to None too.
      layouts: as `lora_transform` takes them, with reasons where `infer_layouts` made them.
    """
    return [
        FrozenRow(
            path, tuple(leaf.shape), math.prod(leaf.shape), _reason(path, leaf, matches, layouts)
        )
        for path, leaf in leaves.items()
        if paths.is_array(leaf) and path not in adapted
    ]


def _reason(path: str, leaf: Any, matches: Mapping[str, Match], layouts: Given) -> str:
    match = matches.get(path)
    if match is not None and match.method is None:
        return f"{match.rule!r} is mapped to None"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"holds {leaf.dtype}"
    if match is not None:
        found = misfit(path, leaf, match.method, layout_of(path, leaf, layouts))
        return found or "its node is not in this delta"
    if path in layouts:
        return _by_use(path, layouts)
    return _by_name(path, leaf)


def _by_use(path: str, layouts: Given) -> str:
    layout = layouts[path]
    if layout is None:
        return getattr(layouts, "reasons", {}).get(path, "no matrix, by its layout")
    if layout.gathered:
        return "an embedding: rows of it are looked up"
    return "the output head, by its name" if is_head(path) else "no target matches it"


def _by_name(path: str, leaf: Any) -> str:
    if guessed_layout(path, leaf) is None:
        return "a vector" if len(leaf.shape) < 2 else "a norm's scale or a bias, by its name"
    if is_embedding_or_head(path):
        return "an embedding or the output head, by its name"
    return "no target matches it"


def narrow_presets(
    rules: Mapping[str, Any],
    leaves: Mapping[str, Any],
    adapted: set[str],
    layouts: Given,
) -> list[str]:
    """A warning, if presets alone were given and reach less than half of what the matrices hold.
    Embeddings and the output head do not count."""
    if not rules or not set(rules) <= set(PRESETS):
        return []
    sizes = {
        path: math.prod(leaf.shape)
        for path, leaf in leaves.items()
        if paths.is_array(leaf) and _may_be_matrix(path, leaf, layouts)
    }
    total, reached = sum(sizes.values()), sum(sizes[path] for path in sizes if path in adapted)
    if 2 * reached >= total:
        return []
    return [
        f"warning: {', '.join(map(repr, rules))} reaches {reached / total:.1%} of the "
        f"{total:,} parameters of matrices. The rows above say why the others stay frozen."
    ]


def _may_be_matrix(path: str, leaf: Any, layouts: Given) -> bool:
    layout = layouts.get(path)
    if layout is not None:
        return not layout.gathered and not is_head(path)
    wide = sum(size > 1 for size in leaf.shape) >= 2
    return wide and guessed_layout(path, leaf) is not None and not is_embedding_or_head(path)


def grouped(rows: Sequence[FrozenRow]) -> list[tuple[str, int, int, str]]:
    """`(path, leaves, parameters, reason)` of rows whose paths differ in numbers alone and whose
    reasons agree."""
    found: dict[tuple[str, str], list[FrozenRow]] = {}
    for row in rows:
        found.setdefault((_NUMBER.sub("*", row.path), row.reason), []).append(row)
    return [
        (of[0].path if len(of) == 1 else path, len(of), sum(row.params for row in of), reason)
        for (path, reason), of in found.items()
    ]
