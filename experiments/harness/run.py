"""A sweep from config and arms to results."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import lora_jax as lora
from experiments.harness import adapters, devices, setup
from experiments.harness.arms import Arm, same_step, trained_together
from experiments.harness.measures import Measures
from experiments.harness.outcome import Outcome, best, row
from experiments.harness.samples import sample
from experiments.harness.shared import Load, Log, Shared, optimizer, prepared
from lora_jax import training
from lora_jax.parallel import hosts
from lora_jax.training.fit import ArmProgress, Diverged, Schedule, fit
from lora_jax.training.sweep import Sweep
from lora_jax.transform import Delta
from lora_jax.weights import PyTree


def run(
    config: ConfigDict,
    arms: Sequence[Arm],
    workdir: Path,
    log: Log,
    *,
    sized: bool = False,
    load: Load | None = None,
    measures: Measures | None = None,
) -> dict[str, Any]:
    """Trains all arms, on from where an earlier call ended; returns what `results.json` holds.

    Args:
      config: the run's.
      arms: the first of them.
      workdir: where checkpoints and adapters go.
      log: see `fit`.
      sized: see `conduct`.
      load: loads model and data; by default `prepared`.
      measures: what is taken of each arm beside its loss.
    """
    started = time.time()
    devices.require_even_arms(config, arms)
    optimizer(config, arms[0])  # refused before the model is loaded
    shared = (load or prepared)(config, workdir, log)
    if sized:
        setup.require_shape(config, shared.model)
    measured = measures.of(shared) if measures else None
    outcomes: list[Outcome] = []
    rows: list[dict[str, Any]] = []
    with hosts.preemption() as stop_requested:
        for group in same_step(arms):
            own = shared.by_loss(group[0].loss)
            sweep = own.task.sweep(group[0])
            for together in trained_together(group):
                found = train(own, together, sweep, stop_requested)
                outcomes += found
                rows += [row(outcome, own.task.unit) for outcome in found]
    if all(outcome.diverged for outcome in outcomes):
        raise ValueError(
            "the loss of every arm stopped being a number. Lower config.train.learning_rate, or "
            "warm up for longer; the checkpoints before are kept."
        )
    model = shared.model
    adapters.save(config, model, outcomes, workdir / "adapters", shared.fingerprint, log)
    base, leading = shared.base, best(outcomes)
    if measures and measured:
        log({"event": "measuring", "what": ", ".join(measures.names)})
        base["measured"] = measured({})
        for outcome, made in zip(outcomes, rows, strict=True):
            made["measured"] = None if outcome.diverged else measured(outcome.delta)
        first = measures.better(rows)
        leading = None if first is None else outcomes[first]
    return {
        "base": base,
        "arms": rows,
        "samples": sample(config, model, leading, shared.task.held_out, log),
        "seconds": time.time() - started,
    }


def train(
    shared: Shared,
    arms: Sequence[Arm],
    sweep: Sweep,
    stop_requested: Callable[[], bool],
    give_up: Callable[[int, float], bool] | None = None,
) -> list[Outcome]:
    """Trains arms together through one step; `give_up` is `fit`'s."""
    config, model, task = shared.config, shared.model, shared.task
    base, fresh = model.params, [_init_delta(arm, model.params) for arm in arms]
    names = [arm.name for arm in arms]
    shared.log({"event": "compiling", "arms": names})
    counts = [lora.describe(base, delta) for delta in fresh]
    try:
        states, progress = fit(
            sweep,
            _first_states(shared, arms, fresh),  # held by nobody else: full ones are large
            base,
            arms=names,
            batches=task.batches(arms[0].data_seed),
            validation=task.validation,
            schedule=_schedule(config),
            folder=shared.workdir / "checkpoints" / arms[0].folder,
            identity={
                "base": shared.fingerprint,
                **_loss_identity(config),
                **task.identity(arms[0].data_seed),
            },
            log=shared.log,
            positions=task.positions,
            stop_requested=stop_requested,
            give_up=give_up,
        )
    except Diverged:
        lost = [ArmProgress(stopped="diverged") for _ in arms]
        return [Outcome(*parts) for parts in zip(arms, fresh, lost, counts, strict=True)]
    trained = [state.delta for state in states]
    return [Outcome(*parts) for parts in zip(arms, trained, progress, counts, strict=True)]


def _loss_identity(config: ConfigDict) -> dict[str, str]:
    """The loss's name, but where it is that of all checkpoints so far, which have none."""
    name = config.train.loss
    return {} if name == "next_token" else {"train.loss": name}


def _first_states(
    shared: Shared, arms: Sequence[Arm], fresh: Sequence[Delta]
) -> list[training.TrainState]:
    tx = optimizer(shared.config, arms[0])
    return [
        training.init_state(
            delta,
            tx,
            learning_rate=arm.learning_rate,
            seed=arm.seed,
            settings=shared.task.settings(arm.settings),
        )
        for arm, delta in zip(arms, fresh, strict=True)
    ]


def _init_delta(arm: Arm, params: PyTree) -> Delta:
    def init(params, key):
        return lora.lora_transform(params, arm.method, targets=arm.targets, key=key)[1]

    return jax.jit(init)(params, jax.random.key(arm.seed))


def _schedule(config: ConfigDict) -> Schedule:
    settings = config.train
    return Schedule(
        steps=settings.steps,
        eval_every=settings.eval_every,
        checkpoint_every=settings.checkpoint_every,
        log_every=settings.log_every,
        patience=settings.patience or None,
    )
