"""Which run a study needs next: each cell at its own best learning rate, then over seeds.

A cell is what a study compares: an arm but for its learning rate and seed. Its rates form a grid
of one factor. With the first seed the search goes from where the cell before ended towards the
lower loss, until both neighbours of the best rate have been tried; the other seeds run at that
rate. A run is given up at a validation where its loss is further than a margin above that of the
cell's best finished run at the same step. All follows from the record of what has been run.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.harness.arms import Arm
from lora_jax.training.fit import GIVEN_UP

Row = Mapping[str, Any]  # of a finished run, as `arms.jsonl` holds it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Stated before a study begins.

    Attributes:
      factor: between neighbouring learning rates.
      seeds: of initialisation, dropout and data order; the first searches.
      margin: in nats; 0 gives no run up.
      most: rates that a cell may try; where the best is an edge of these, the record says so.
    """

    factor: float
    seeds: tuple[int, ...]
    margin: float
    most: int


def rules_of(config: ConfigDict) -> Rules:
    """Raises ValueError for rules by which nothing could be told."""
    settings = config.study
    if not 1 < settings.factor <= 2:
        raise ValueError(
            f"config.study.factor={settings.factor:g}: neighbouring learning rates differ by more "
            "than 1 and by at most 2; a coarser grid misses the best one."
        )
    seeds = tuple(settings.seeds)
    if len(set(seeds)) < 3:
        raise ValueError(
            f"config.study.seeds={seeds}: a claim about a difference needs at least three seeds."
        )
    if settings.margin < 0:
        raise ValueError(f"config.study.margin={settings.margin:g}: expected 0 or more nats.")
    if settings.most < 3:
        raise ValueError(
            f"config.study.most={settings.most}: a best learning rate and its two neighbours are "
            "three."
        )
    return Rules(factor=settings.factor, seeds=seeds, margin=settings.margin, most=settings.most)


def next_trial(rules: Rules, cells: Sequence[Arm], rows: Sequence[Row]) -> Arm | None:
    """The next run; None where all have been made."""
    starts: dict[Any, float] = {}
    for cell in cells:
        own = of_cell(cell, rows)
        tried = tried_rates(own, rules.seeds[0])
        rate = _sought(rules, cell, tried, starts.get(cell.step, cell.learning_rate))
        if rate is not None:
            return trial(cell, rate, rules.seeds[0])
        best = best_rate(tried)
        if math.isinf(tried[best]):
            continue
        if not cell.fixed_rate:
            starts[cell.step] = best
        made = seeds_at(own, best)
        for seed in rules.seeds:
            if seed not in made:
                return trial(cell, best, seed)
    return None


def _sought(rules: Rules, cell: Arm, tried: Mapping[float, float], start: float) -> float | None:
    if cell.fixed_rate:
        return None if tried else cell.learning_rate
    return next_rate(tried, start, rules)


def next_rate(tried: Mapping[float, float], start: float, rules: Rules) -> float | None:
    """The rate to try next, of losses by rate; None where the search has ended."""
    if not tried:
        return start
    if len(tried) >= rules.most:
        return None
    best = best_rate(tried)
    above, below = best * rules.factor, best / rules.factor
    neighbours = (above, below) if math.isfinite(tried[best]) else (below,)
    return next((rate for rate in neighbours if not _has(tried, rate)), None)


def best_rate(tried: Mapping[float, float]) -> float:
    """Of the lowest loss; the lower one of equals."""
    return min(tried, key=lambda rate: (tried[rate], rate))


def is_edge(tried: Mapping[float, float], factor: float) -> bool:
    """Whether a neighbour of the best rate has not been tried."""
    best = best_rate(tried)
    return not all(_has(tried, rate) for rate in (best * factor, best / factor))


def hopeless(rules: Rules, cell: Arm, rows: Sequence[Row]) -> Callable[[int, float], bool]:
    """Says of a validation loss at a step whether a run of the search is given up there."""
    finished = [
        row for row in of_cell(cell, rows) if row["seed"] == rules.seeds[0] and not row["stopped"]
    ]
    if not rules.margin or not finished:
        return lambda step, loss: False
    best = min(finished, key=lambda row: row["val_loss"])
    curve = dict(best["val_curve"])

    def is_hopeless(step: int, loss: float) -> bool:
        return step in curve and loss > curve[step] + rules.margin

    return is_hopeless


def trial(cell: Arm, rate: float, seed: int) -> Arm:
    """A run of a cell."""
    name = f"{cell.cell} lr {rate:.3g} seed {seed}"
    return dataclasses.replace(cell, name=name, learning_rate=rate, seed=seed, data_seed=seed)


def of_cell(cell: Arm, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["cell"] == cell.cell]


def tried_rates(rows: Sequence[Row], seed: int) -> dict[float, float]:
    """The loss of each rate that the search tried, infinite where the run diverged or was given
    up."""
    return {
        row["learning_rate"]: math.inf if row["stopped"] in ("diverged", GIVEN_UP)
        else row["val_loss"]
        for row in rows
        if row["seed"] == seed
    }  # fmt: skip


def seeds_at(rows: Sequence[Row], rate: float) -> dict[int, float | None]:
    """The loss of each seed at a rate, None where the run diverged."""
    return {row["seed"]: row["val_loss"] for row in at_rate(rows, rate)}


def at_rate(rows: Sequence[Row], rate: float) -> list[Row]:
    return [row for row in rows if _same(row["learning_rate"], rate)]


def _has(tried: Mapping[float, float], rate: float) -> bool:
    return any(_same(known, rate) for known in tried)


def _same(rate: float, other: float) -> bool:
    return math.isclose(rate, other, rel_tol=1e-6)
