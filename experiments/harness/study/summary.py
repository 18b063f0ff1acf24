"""What the runs of a study say: each cell at its best rate, and the differences between cells."""

import itertools
from collections.abc import Sequence
from typing import Any

from experiments.harness.arms import Arm
from experiments.harness.study.search import (
    Row,
    Rules,
    at_rate,
    best_rate,
    is_edge,
    next_trial,
    of_cell,
    seeds_at,
    tried_rates,
)
from experiments.harness.study.statistics import interval, paired

Results = dict[str, Any]


def results_of(rules: Rules, cells: Sequence[Arm], rows: Sequence[Row]) -> Results:
    """What the rows say: a summary of each cell and the paired differences of all pairs."""
    summary = [_cell(rules, cell, own) for cell in cells if (own := of_cell(cell, rows))]
    return {
        "base": rows[0]["base"] if rows else None,
        "arms": list(rows),
        "cells": summary,
        "differences": [
            found
            for one, other in itertools.combinations(summary, 2)
            if (found := _difference(one, other))
        ],
        "complete": next_trial(rules, cells, rows) is None,
        "seconds": sum(row["seconds"] for row in rows),
    }


def _cell(rules: Rules, cell: Arm, rows: Sequence[Row]) -> dict[str, Any]:
    tried = tried_rates(rows, rules.seeds[0])
    best = best_rate(tried)
    losses = seeds_at(rows, best)
    values = [loss for loss in losses.values() if loss is not None]
    spread = interval(values) if len(values) > 1 else None
    return {
        "cell": cell.cell,
        "label": cell.label,
        "group": cell.group,
        "rank": cell.rank,
        "targets": cell.targets,
        "trainable_params": rows[0]["trainable_params"],
        "learning_rate": best,
        "edge": not cell.fixed_rate and is_edge(tried, rules.factor),
        "tried": len(tried),
        "losses": losses,
        "forgotten": _forgotten(rows, best),
        "mean": spread.mean if spread else (values[0] if values else None),
        "interval": [spread.low, spread.high] if spread else None,
    }


def _forgotten(rows: Sequence[Row], rate: float) -> list[float] | None:
    """What each seed at a rate lost on the other text, in nats above the untuned base."""
    return [
        row["other_loss"] - row["base"]["other_loss"]
        for row in at_rate(rows, rate)
        if row.get("other_loss") is not None
    ] or None


def _difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any] | None:
    found = paired(one["losses"], other["losses"])
    if found is None:
        return None
    return {
        "cells": [one["cell"], other["cell"]],
        "mean": found.mean,
        "interval": [found.low, found.high],
        "seeds": found.seeds,
        "differ": found.leaves_out_zero,
    }
