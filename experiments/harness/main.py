"""The command line that the experiments share."""

import dataclasses
import functools
import hashlib
import json
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from configs.budgets import BUDGETS
from experiments.harness import plan, report, setup
from experiments.harness.arms import Arm
from experiments.harness.measures import Measures
from experiments.harness.progress import console, counted, reporting
from experiments.harness.run import run
from experiments.harness.shared import Load
from experiments.harness.study import study as studies
from experiments.harness.study.study import Study
from experiments.harness.workdir import prepare
from lora_jax.parallel import ending, hosts
from lora_jax.training.fit import Preempted

Results = dict[str, Any]
ROOT = Path(__file__).parents[2]
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where records go; by default runs/EXPERIMENT-CONFIG-HASH."
)
_PLAN = flags.DEFINE_bool(
    "plan", False, "Print parameters and memory of each arm without loading weights, and end."
)
_BUDGET = flags.DEFINE_enum(
    "budget",
    None,
    ["cpu", "gpu"],
    "Run the experiment whole, each arm at its own best learning rate and over seeds, at the size "
    "for two CPU cores or for one H100 (configs/budgets.py). The same command continues it.",
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Run as one of several processes, which JAX finds by itself on a TPU pod, under Slurm, Open "
    "MPI and Kubernetes. Start the same command everywhere, with a --workdir that all can write.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where JAX does not find it."
)
_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes there are, where JAX does not find it."
)
_PROCESS = flags.DEFINE_integer(
    "process_id", None, "Which of them this is, from 0, where JAX does not find it."
)
_TIMEOUT = flags.DEFINE_integer(
    "process_timeout", 100, "Seconds after which a process that died ends the others."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lockstep:
    """What an experiment runs without --budget: arms that share one step, and their picture."""

    arms: Callable[[ConfigDict], Sequence[Arm]]
    draw: Callable[[Path, dict], None]


def main(
    experiment: str,
    title: str,
    study: Study,
    lockstep: Lockstep | None = None,
    *,
    config_file: str = "smollm2_135m",
) -> None:
    """Runs the study, or without --budget the quicker arms in lockstep where there are some."""

    def work(config: ConfigDict, workdir: Path) -> None:
        setup.require_filled(config)
        start: Callable[..., Any]
        if lockstep is None or _BUDGET.value:
            arms = studies.cells_of(config, study)
            start = functools.partial(studies.conduct, what=study)
        else:
            arms = lockstep.arms(config)
            start = functools.partial(
                conduct,
                draw=lockstep.draw,
                sized=study.sized,
                load=study.load,
                measures=study.measures,
            )
        if _PLAN.value:
            console.print(plan.plan(config, arms), markup=False)
        else:
            start(experiment, title, config, arms, workdir)

    launch(experiment, work, plans=True, config_file=config_file)


def launch(
    experiment: str,
    work: Callable[[ConfigDict, Path], None],
    *,
    plans: bool = False,
    config_file: str = "smollm2_135m",
) -> None:
    """Runs `work(config, workdir)` as the command line says; an error is one line for a person.
    `plans` says whether it heeds --plan; `config_file` is the default one of configs/.
    """
    given = config_flags.DEFINE_config_file(
        "config", str(ROOT / "configs" / f"{config_file}.py"), "The model's configuration file."
    )

    def start(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            sys.exit(f"{experiment}: unexpected argument {argv[1]!r}; flags start with --.")
        if _PLAN.value and not plans:
            sys.exit(
                f"{experiment}: no --plan here; rank_sweep, target_ablation, methods, "
                "preference, reinforce and finetune have it."
            )
        setup.quiet_logs()
        config = _with_budget(experiment, given)
        name = "-".join(filter(None, (experiment, config.name, _short_hash(config))))
        try:
            _join()
            with ending.together():
                work(config, Path(_WORKDIR.value or f"runs/{name}"))
        except (ValueError, FileNotFoundError) as error:
            sys.exit(f"{experiment}: {error}")
        except KeyboardInterrupt:
            sys.exit(f"\n{experiment}: interrupted; the same command continues.")
        except Preempted as notice:
            sys.exit(f"{experiment}: {notice}; the same command continues.")
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            sys.exit(
                f"{experiment}: process {jax.process_index()}: {str(error).splitlines()[0]}\nWhere "
                "that is a connection, another process has ended, and says why itself; the same "
                "commands continue."
            )

    app.run(start)


def conduct(
    experiment: str,
    title: str,
    config: ConfigDict,
    arms: Sequence[Arm],
    workdir: Path,
    draw: Callable[[Path, dict], None],
    *,
    sized: bool = False,
    load: Load | None = None,
    measures: Measures | None = None,
) -> Results:
    """Runs all arms, leaves records, results, a table and a picture in `workdir`, and returns the
    results.

    Args:
      sized: whether arms took their sizes from `config.model.shape`, which then has to be true.
      load, measures: see `run`.
    """
    prepare(experiment, config, workdir)
    console.print(
        f"[bold]{title}[/bold] with {config.name}: {counted(len(arms))}, records in {workdir}"
    )
    with reporting(workdir / "metrics.jsonl") as log:
        results = run(config, arms, workdir, log, sized=sized, load=load, measures=measures)

    def record() -> None:
        report.write(workdir, f"{title}, {config.name}", shlex.join(["python", *sys.argv]), results)
        draw(workdir / f"{experiment}.png", results)
        console.print(
            f"\nresults.json, results.md, metrics.jsonl and {experiment}.png are in {workdir}"
        )

    hosts.on_first(record)
    return results


def _with_budget(experiment: str, given: Any) -> ConfigDict:
    """The config with what --budget sets, under what the command line sets."""
    config, name = given.value, _BUDGET.value
    if name is None:
        return config
    if experiment not in BUDGETS:
        sys.exit(f"{experiment}: no --budget here; {', '.join(BUDGETS)} have it.")
    config.update_from_flattened_dict(BUDGETS[experiment][name])
    config.update_from_flattened_dict(config_flags.get_override_values(flags.FLAGS["config"]))
    return config


def _join() -> None:
    """Makes this process part of its job, where the command line says that there is one."""
    given = (_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    if not _DISTRIBUTED.value and given == (None, None, None):
        return
    hosts.start(
        coordinator_address=_COORDINATOR.value,
        num_processes=_PROCESSES.value,
        process_id=_PROCESS.value,
        timeout_seconds=_TIMEOUT.value,
    )
    if not hosts.is_first():
        console.quiet = True
        logging.disable(logging.WARNING)
    console.print(
        f"{jax.process_count()} processes, {jax.device_count()} devices. If one process dies, the "
        f"others end within {_TIMEOUT.value} s; the same commands continue.",
        markup=False,
    )


def _short_hash(config: ConfigDict) -> str:
    text = json.dumps(config.to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:6]
