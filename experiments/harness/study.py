"""A study: cells at their own best learning rates, over seeds, one run after another.

Every finished run is a line of `arms.jsonl` in the workdir, and is not run again. Results, table
and picture are written anew after each.
"""

import functools
import itertools
import shutil
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.harness import adapters, run
from experiments.harness.arms import Arm
from experiments.harness.outcome import row
from experiments.harness.search import (
    Row,
    Rules,
    best_rate,
    hopeless,
    is_edge,
    next_trial,
    of_cell,
    rules_of,
    seeds_at,
    tried_rates,
)
from experiments.harness.statistics import interval, paired
from lora_jax.parallel import hosts
from lora_jax.training import records
from lora_jax.training.sweep import Sweep

ARMS = "arms.jsonl"
Results = dict[str, Any]


def study(
    config: ConfigDict,
    cells: Sequence[Arm],
    workdir: Path,
    log: run.Log,
    recorded: Callable[[Results], None],
) -> Results:
    """Makes the runs that the record lacks; `recorded` hears of the results after each."""
    rules, rows = rules_of(config), list(records.read(workdir / ARMS))
    started = time.time()
    results = results_of(rules, cells, rows)
    if next_trial(rules, cells, rows) is None:
        recorded(results)
        return results
    shared = run.prepared(config, workdir, log)
    sweeps: dict[Hashable, Sweep] = {}
    with hosts.preemption() as stop_requested:
        while (arm := next_trial(rules, cells, rows)) is not None:
            if arm.step not in sweeps:
                sweeps[arm.step] = run.compiled_once(shared, arm)
            done = _made(shared, rules, arm, rows, sweeps[arm.step], stop_requested)
            done["seconds"] = time.time() - started
            rows.append(done)
            hosts.on_first(functools.partial(records.append, workdir / ARMS, done))
            base = {"name": shared.model.name, "source": shared.model.source}
            results = {
                "base": {**base, "val_loss": shared.base_loss},
                **results_of(rules, cells, rows),
            }
            recorded(results)
            started = time.time()
    return results


def _made(
    shared: run.Shared,
    rules: Rules,
    arm: Arm,
    rows: Sequence[Row],
    sweep: Sweep,
    stop_requested: Callable[[], bool],
) -> dict[str, Any]:
    """One run, its adapter saved and its checkpoints gone."""
    first = arm.seed == rules.seeds[0]
    give_up = hopeless(rules, arm, rows) if first else None
    [outcome] = run.train(shared, [arm], sweep, stop_requested, give_up)
    workdir = shared.workdir
    if not outcome.progress.stopped:
        folder = workdir / "adapters"
        adapters.save(
            shared.config, shared.model, [outcome], folder, shared.fingerprint, shared.log
        )
    curve = [
        (record["step"], record["val_loss"])
        for record in records.read(workdir / "metrics.jsonl")
        if record.get("arm") == arm.name and "val_loss" in record
    ]
    hosts.on_first(lambda: shutil.rmtree(workdir / "checkpoints" / arm.folder, ignore_errors=True))
    return {**row(outcome), "val_curve": curve}


def results_of(rules: Rules, cells: Sequence[Arm], rows: Sequence[Row]) -> Results:
    """What the rows say: a summary of each cell and the paired differences of all pairs."""
    summary = [_cell(rules, cell, own) for cell in cells if (own := of_cell(cell, rows))]
    return {
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
        "edge": is_edge(tried, rules.factor),
        "tried": len(tried),
        "losses": losses,
        "mean": spread.mean if spread else (values[0] if values else None),
        "interval": [spread.low, spread.high] if spread else None,
    }


def _difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any] | None:
    found = paired(one["losses"], other["losses"])
    if found is None:
        return None
    return {
        "cells": [one["cell"], other["cell"]],
        "mean": found.mean,
        "interval": [found.low, found.high],
        "seeds": found.count,
        "differ": found.leaves_out_zero,
    }
