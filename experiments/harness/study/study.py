"""A study: cells at their own best learning rates, over seeds, one run after another.

Every finished run is a line of `arms.jsonl` in the workdir, and is not run again. Results, table
and picture are written anew after each.
"""

import dataclasses
import functools
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.harness import adapters, run
from experiments.harness.arms import Arm
from experiments.harness.outcome import row
from experiments.harness.progress import console, reporting
from experiments.harness.study import report
from experiments.harness.study.search import Row, Rules, hopeless, next_trial, rules_of
from experiments.harness.study.summary import Results, results_of
from experiments.harness.workdir import prepare
from lora_jax.parallel import hosts
from lora_jax.training import records
from lora_jax.training.sweep import Sweep

ARMS = "arms.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What --budget runs: the cells of a config, and their picture."""

    cells: Callable[[ConfigDict], Sequence[Arm]]
    draw: Callable[[Path, dict], None]


def conduct(
    experiment: str,
    title: str,
    config: ConfigDict,
    cells: Sequence[Arm],
    workdir: Path,
    what: Study,
) -> None:
    """Makes the runs that the record in `workdir` lacks, and writes results, table and picture
    after each."""
    prepare(experiment, config, workdir, ignoring=("study.cells",))
    console.print(f"[bold]{title}[/bold] with {config.name}: records in {workdir}")
    command = shlex.join(["python", *sys.argv])

    def recorded(results: Results) -> None:
        report.write(workdir, f"{title}, {config.name}", command, results)
        what.draw(workdir / f"{experiment}.png", results)

    with reporting(workdir / "metrics.jsonl") as log:
        results = study(
            config, cells, workdir, log, lambda found: hosts.on_first(lambda: recorded(found))
        )
    console.print(report.in_words(results), markup=False)


def cells_of(config: ConfigDict, what: Study) -> Sequence[Arm]:
    """Those of the study that the config asks for.

    Raises:
      ValueError: for a name of none.
    """
    rules_of(config)
    cells = what.cells(config)
    names = [cell.cell for cell in cells]
    unknown = [name for name in config.study.cells if name not in names]
    if unknown:
        raise ValueError(
            f"config.study.cells has {unknown[0]!r}: expected some of {', '.join(names)}."
        )
    return [cell for cell in cells if cell.cell in (config.study.cells or names)]


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
            results = results_of(rules, cells, rows)
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
    base = {"name": shared.model.name, "source": shared.model.source, "val_loss": shared.base_loss}
    return {**row(outcome), "val_curve": curve, "base": base}
