"""What a delta adapts, and how many parameters it trains, as a table."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from lora_jax import paths
from lora_jax.frozen import FrozenRow, frozen_rows, grouped, narrow_presets
from lora_jax.layouts import Layout
from lora_jax.masks import trainable_mask
from lora_jax.methods import Method
from lora_jax.tables import aligned
from lora_jax.targets import Match, Targets, as_rules, match_all
from lora_jax.transform import Delta, delta_nodes
from lora_jax.weights import PyTree, is_weight


@dataclasses.dataclass(frozen=True)
class Row:
    """One adapted path: the weight's shape, how it is adapted, and how much of it trains."""

    path: str
    rule: str
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    trainable: int


@dataclasses.dataclass(frozen=True)
class Description:
    """What of a tree trains and what stays frozen, with its share of the parameters; `str` gives
    the tables.

    Attributes:
      rows: one for each path of the delta.
      trainable_params, all_params: as PEFT counts them.
      frozen: one for each array that is not adapted, with the reason.
      warnings: what of this is likely to be a mistake.
    """

    rows: tuple[Row, ...]
    trainable_params: int
    all_params: int
    frozen: tuple[FrozenRow, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def trainable_percent(self) -> float:
        return 100 * self.trainable_params / self.all_params

    def summary(self) -> str:
        return (
            f"trainable params: {self.trainable_params:,} || all params: {self.all_params:,} || "
            f"trainable%: {self.trainable_percent:.4f}"
        )

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [("path", "rule", "delta", "weight", "rank", "trainable")]
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            rank = "" if row.rank is None else str(row.rank)
            cells.append((row.path, row.rule, row.kind, shape, rank, f"{row.trainable:,}"))
        if not any(row.rule for row in self.rows):
            cells = [(path, *rest) for path, _, *rest in cells]
        tables = [aligned(cells, left=3), *self._frozen_table(), *self.warnings]
        return "\n".join([*tables, self.summary()])

    def _frozen_table(self) -> list[str]:
        if not self.frozen:
            return []
        cells = [("frozen", "reason", "leaves", "share")]
        for path, leaves, params, reason in grouped(self.frozen):
            cells.append((path, reason, f"{leaves}", f"{params / self.all_params:.2%}"))
        return [aligned(cells, left=2)]


def describe(
    base: PyTree,
    delta: Delta,
    method: Method | Mapping[str, Method | None] | None = None,
    *,
    targets: Targets = "all-linear",
    layouts: Mapping[str, Layout | None] | None = None,
) -> Description:
    """Counts the trained parameters of each path, and says what stays frozen and why. Abstract
    trees will do: nothing is allocated.

    "all params" are the base's (of a quantised weight the logical count) and the delta's, as PEFT
    counts them. Adapted over stacked layers, a path's count covers all of them.

    Args:
      base: the frozen tree, or its `jax.eval_shape`.
      delta: the delta, or its `jax.eval_shape`.
      method: what `lora_transform` was given, to name the rule that picked each path.
      targets: likewise.
      layouts: likewise; those of `infer_layouts` give the reason and the line of each leaf that is
        no matrix.

    Raises:
      ValueError: for a leaf of `delta` that is not a delta node, a rule that matches nothing, or
        `targets` beside a mapping.
    """
    flat = paths.flatten(base, is_leaf=is_weight)
    nodes = delta_nodes(delta)
    rules: dict[str, Any] = {}
    matches: dict[str, Match] = {}
    if method is not None:
        rules = as_rules(method, targets)
        matches = {match.path: match for match in match_all(flat, rules, layouts)}
    rows = []
    for path, node in nodes.items():
        flags = jax.tree.leaves(trainable_mask(node))
        sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(node)]
        trained = sum(size for size, flag in zip(sizes, flags, strict=True) if flag)
        shape = tuple(flat[path].shape) if path in flat else ()
        rule = matches[path].rule if path in matches else ""
        rows.append(Row(path, rule, type(node).__name__, shape, node.rank, trained))
    trained = sum(row.trainable for row in rows)
    arrays = [leaf for leaf in flat.values() if paths.is_array(leaf)]
    total = trained + sum(math.prod(leaf.shape) for leaf in arrays)
    known, adapted = layouts or {}, set(nodes)
    frozen = frozen_rows(flat, adapted, matches, known)
    warnings = narrow_presets(rules, flat, adapted, known)
    return Description(tuple(rows), trained, total, tuple(frozen), tuple(warnings))
