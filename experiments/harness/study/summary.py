"""What the runs of a study say: each cell at its best rate, and the differences between cells."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.harness.arms import Arm
from experiments.harness.measures import compared_by
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
LOSS = compared_by(None)


def results_of(
    rules: Rules,
    cells: Sequence[Arm],
    rows: Sequence[Row],
    compared: Mapping[str, Any] = LOSS,
) -> Results:
    """What the rows say: a summary of each cell and the paired differences of all pairs, in what
    `compared` names; see `compared_by`."""
    summary = [
        _cell(rules, cell, own, compared["by"]) for cell in cells if (own := of_cell(cell, rows))
    ]
    return {
        "base": rows[0]["base"] if rows else None,
        "arms": list(rows),
        "cells": summary,
        "differences": [
            found
            for one, other in itertools.combinations(summary, 2)
            if (found := _difference(one, other))
        ],
        "compared": dict(compared),
        "complete": next_trial(rules, cells, rows) is None,
        "seconds": sum(row["seconds"] for row in rows),
    }


def _cell(rules: Rules, cell: Arm, rows: Sequence[Row], by: str) -> dict[str, Any]:
    tried = tried_rates(rows, rules.seeds[0])
    best = best_rate(tried)
    found = {row["seed"]: _compared(row, by) for row in at_rate(rows, best)}
    values = [value for value in found.values() if value is not None]
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
        "losses": seeds_at(rows, best),
        "values": found,
        "measured": _measured(rows, best),
        "forgotten": _forgotten(rows, best),
        "mean": spread.mean if spread else (values[0] if values else None),
        "interval": [spread.low, spread.high] if spread else None,
    }


def _compared(row: Row, by: str) -> float | None:
    """A run's value of what is compared; None where it diverged."""
    if by == LOSS["by"]:
        return row["val_loss"]
    return (row["measured"] or {}).get(by)


def _measured(rows: Sequence[Row], rate: float) -> dict[str, list[float]]:
    """What was measured of each seed at a rate, by name."""
    found = [row["measured"] for row in at_rate(rows, rate) if row.get("measured")]
    return {name: [numbers[name] for numbers in found] for name in (found[0] if found else ())}


def _forgotten(rows: Sequence[Row], rate: float) -> list[float] | None:
    """What each seed at a rate lost on the other text, in nats above the untuned base."""
    return [
        row["other_loss"] - row["base"]["other_loss"]
        for row in at_rate(rows, rate)
        if row.get("other_loss") is not None
    ] or None


def _difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any] | None:
    found = paired(one["values"], other["values"])
    if found is None:
        return None
    return {
        "cells": [one["cell"], other["cell"]],
        "mean": found.mean,
        "interval": [found.low, found.high],
        "seeds": found.seeds,
        "differ": found.leaves_out_zero,
    }
