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
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.harness import adapters, devices, full_updates, run, setup
from experiments.harness.arms import Arm
from experiments.harness.losses import learning_by, loss_of
from experiments.harness.measures import Measured, Measures, compared_by
from experiments.harness.other_text import text_batches
from experiments.harness.outcome import Outcome, row
from experiments.harness.progress import console, reporting
from experiments.harness.shared import Load, Log, Shared, mean_loss_over, prepared
from experiments.harness.study import report
from experiments.harness.study.search import Rules, hopeless, next_trial, rules_of
from experiments.harness.study.summary import Results, results_of
from experiments.harness.workdir import prepare
from lora_jax.parallel import hosts
from lora_jax.training import records
from lora_jax.training.sweep import Sweep
from lora_jax.transform import Delta

ARMS = "arms.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """What the runs of a study need.

    Attributes:
      shared: that of the config's own loss.
      measured: what is measured of each run.
      of_base: the same of the untuned base.
    """

    shared: Shared
    measured: Measured
    of_base: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A question to be settled.

    Attributes:
      cells: what is compared.
      draw: the picture, into a file.
      completed: adds to the results when all runs have been made.
      sized: whether cells take their sizes from `config.model.shape`, which then has to be true.
      load: loads model and data; see `prepared`.
      measures: what is taken of each run beside its loss; cells are then compared by it.
    """

    cells: Callable[[ConfigDict], Sequence[Arm]]
    draw: Callable[[Path, Results], None]
    completed: Callable[[ConfigDict, Sequence[Arm], Results], Results] | None = None
    sized: bool = False
    load: Load = prepared
    measures: Measures | None = None


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
        def record() -> None:
            report.write(workdir, f"{title}, {config.name}", command, results)
            what.draw(workdir / f"{experiment}.png", results)

        hosts.on_first(record)

    with reporting(workdir / "metrics.jsonl") as log:
        loaded = functools.cache(lambda: _loaded(config, workdir, log, what))
        results = study(
            rules_of(config), cells, workdir, loaded, recorded, compared_by(what.measures)
        )
    if what.completed:
        results = what.completed(config, cells, results)
        recorded(results)
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
    rules: Rules,
    cells: Sequence[Arm],
    workdir: Path,
    loaded: Callable[[], Loaded],
    recorded: Callable[[Results], None],
    compared: Mapping[str, Any],
) -> Results:
    """Makes the runs that the record lacks; `recorded` hears of the results after each. Nothing is
    loaded where all have been made."""
    rows = list(records.read(workdir / ARMS))
    results = results_of(rules, cells, rows, compared)
    sweeps: dict[Hashable, Sweep] = {}
    with hosts.preemption() as stop_requested:
        while (arm := next_trial(rules, cells, rows)) is not None:
            shared = loaded().shared.by_loss(arm.loss)
            if arm.step not in sweeps:
                sweeps[arm.step] = shared.task.sweep(arm)
            started = time.time()
            first = arm.seed == rules.seeds[0]
            give_up = hopeless(rules, arm, rows) if first else None
            [outcome] = run.train(shared, [arm], sweeps[arm.step], stop_requested, give_up)
            done = _finished(shared, outcome, loaded())
            done["seconds"] = time.time() - started
            rows.append(done)
            hosts.on_first(functools.partial(records.append, workdir / ARMS, done))
            results = results_of(rules, cells, rows, compared)
            recorded(results)
    return results


def _finished(shared: Shared, outcome: Outcome, loaded: Loaded) -> dict[str, Any]:
    """The row of a run, its adapter saved and its checkpoints gone."""
    workdir, arm = shared.workdir, outcome.arm
    if not outcome.progress.stopped:
        folder = workdir / "adapters"
        adapters.save(
            shared.config, shared.model, [outcome], folder, shared.fingerprint, shared.log
        )
        if shared.config.study.save_full:
            full_updates.save_all(workdir / full_updates.FOLDER, [outcome], shared.fingerprint)
    curve = [
        (record["step"], record["val_loss"])
        for record in records.read(workdir / "metrics.jsonl")
        if record.get("arm") == arm.name and "val_loss" in record
    ]
    hosts.on_first(lambda: shutil.rmtree(workdir / "checkpoints" / arm.folder, ignore_errors=True))
    base = {**shared.base, **loaded.of_base}
    measured = dict.fromkeys(base) if outcome.diverged else loaded.measured(outcome.delta)
    found = {name: measured[name] for name in loaded.of_base}
    return {**row(outcome, shared.task.unit), "val_curve": curve, "base": base, **found}


def _loaded(config: ConfigDict, workdir: Path, log: Log, what: Study) -> Loaded:
    shared = what.load(config, workdir, log)
    if what.sized:
        setup.require_shape(config, shared.model)
    parts: dict[str, Callable[[Delta], Any]] = {}
    if what.measures:
        parts["measured"] = what.measures.of(shared)
    if config.study.other_text:
        parts["other_loss"] = _other_loss(config, shared)

    def measured(delta: Delta) -> dict[str, Any]:
        return {name: take(delta) for name, take in parts.items()}

    return Loaded(shared=shared, measured=measured, of_base=measured({}))


def _other_loss(config: ConfigDict, shared: Shared) -> Callable[[Delta], float]:
    """The loss of next tokens on `config.study.other_text`, whatever the runs learn by."""
    rows, length = config.data.batch_size, config.data.seq_len
    batches = text_batches(shared.model, Path(config.study.other_text), rows=rows, length=length)
    config, params = learning_by(config, "next_token"), shared.model.params
    loss = loss_of(config, shared.model.config, params)
    execution = devices.execution(config, params, loss.fields)
    return mean_loss_over(batches, loss, params, execution)
