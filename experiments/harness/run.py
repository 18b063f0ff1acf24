"""A sweep from config and arms to results."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

import lora_jax as lora
from experiments.harness import adapters, devices, setup
from experiments.harness.arms import Arm, same_kind
from experiments.harness.samples import sample
from lora_jax import data, training
from lora_jax.interop import Pretrained
from lora_jax.training import checkpoints
from lora_jax.training.execution import Execution
from lora_jax.training.fit import ArmProgress, Schedule, fit, mean_losses
from lora_jax.training.sweep import make_sweep, same_shapes
from lora_jax.transform import Delta

Log = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of an arm: its delta, its own shapes restored, and its progress."""

    arm: Arm
    delta: Delta
    progress: ArmProgress


def run(config: ConfigDict, arms: Sequence[Arm], workdir: Path, log: Log) -> dict[str, Any]:
    """Trains all arms, on from where an earlier call ended; returns what `results.json` holds."""
    started = time.time()
    log({"event": "loading", "what": f"model {config.model.source}"})
    model = setup.load_model(config)
    execution = devices.execution(config, model.params)
    model = dataclasses.replace(model, params=execution.base(model.params))
    log({"event": "loading", "what": f"data {config.data.source}"})
    validation = setup.validation_batches(config, model)
    identity = {"base": checkpoints.fingerprint(model.params)}
    outcomes: list[Outcome] = []
    base_loss = math.nan
    for number, kind in enumerate(same_kind(arms)):
        first, more = _train(config, kind, model, execution, validation, identity, workdir, log)
        base_loss = first if number == 0 else base_loss
        outcomes += more
    adapters.save(config, model, outcomes, workdir / "adapters")
    return {
        "base": {"name": model.name, "source": model.source, "val_loss": base_loss},
        "arms": [_row(outcome, model) for outcome in outcomes],
        "samples": sample(config, model, _best(outcomes), log),
        "seconds": time.time() - started,
    }


def _train(
    config: ConfigDict,
    arms: Sequence[Arm],
    model: Pretrained,
    execution: Execution,
    validation: Sequence[data.Batch],
    identity: dict[str, str],
    workdir: Path,
    log: Log,
) -> tuple[float, list[Outcome]]:
    """Trains arms of one method through one step. Returns the base's validation loss, and them."""
    fresh = [_fresh_delta(arm, model) for arm in arms]
    tx = optimizer(config)
    loss = training.llama_loss(model.config, remat=config.model.remat)
    loss = devices.over_devices(config, model.params, loss)
    step = training.train_step(
        loss, tx, accumulate=config.train.accumulate, axis_name=execution.axis_name
    )
    evaluate = functools.partial(_without_dropout, loss)
    sweep = make_sweep(step, evaluate, config.sweep.mode, execution)
    states = [
        training.init_state(delta, tx, learning_rate=arm.learning_rate, seed=arm.seed)
        for arm, delta in zip(arms, same_shapes(fresh), strict=True)
    ]
    log({"event": "compiling", "arms": [arm.name for arm in arms]})
    base_loss = mean_losses(sweep, sweep.pack(states[:1]), model.params, validation)[0]
    log({"event": "base", "val_loss": base_loss})
    states, progress = fit(
        sweep,
        states,
        model.params,
        arms=[arm.name for arm in arms],
        batches=setup.training_batches(config, model),
        validation=validation,
        schedule=_schedule(config),
        folder=workdir / "checkpoints" / type(arms[0].method).__name__.lower(),
        identity=identity,
        log=log,
    )
    trained = lora.unstack(lora.stack([state.delta for state in states]), like=fresh)
    return base_loss, [Outcome(*parts) for parts in zip(arms, trained, progress, strict=True)]


def _fresh_delta(arm: Arm, model: Pretrained) -> Delta:
    def draw(params, key):
        return lora.lora_transform(params, arm.method, targets=arm.targets, key=key)[1]

    return jax.jit(draw)(model.params, jax.random.key(arm.seed))  # one program, not one a weight


def _without_dropout(loss: training.LossSum, delta: Delta, base: Any, batch: Any):
    return loss(delta, base, batch, None)


def optimizer(config: ConfigDict) -> optax.GradientTransformationExtraArgs:
    """AdamW, its state where `config.train.optimizer_memory` says."""
    settings = config.train
    tx = training.adamw(
        steps=settings.steps,
        warmup_steps=settings.warmup_steps,
        schedule=settings.schedule,
        clip_norm=settings.clip_norm,
        weight_decay=settings.weight_decay,
    )
    if settings.optimizer_memory not in ("device", "pinned_host"):
        raise ValueError(
            f"config.train.optimizer_memory={settings.optimizer_memory!r}: expected one of device, "
            "pinned_host."
        )
    return tx if settings.optimizer_memory == "device" else training.paged(tx)


def _schedule(config: ConfigDict) -> Schedule:
    settings = config.train
    return Schedule(
        steps=settings.steps,
        eval_every=settings.eval_every,
        checkpoint_every=settings.checkpoint_every,
        log_every=settings.log_every,
        patience=settings.patience or None,
    )


def _row(outcome: Outcome, model: Pretrained) -> dict[str, Any]:
    arm, progress = outcome.arm, outcome.progress
    counts = lora.describe(model.params, outcome.delta)
    loss = None if progress.stopped == "diverged" else progress.val_loss
    return {
        "name": arm.name,
        "group": arm.group,
        "rank": arm.rank,
        "targets": arm.targets,
        "learning_rate": arm.learning_rate,
        "seed": arm.seed,
        "trainable_params": counts.trainable_params,
        "trainable_percent": counts.trainable_percent,
        "train_loss": progress.train_loss,
        "val_loss": loss,
        "perplexity": None if loss is None else math.exp(loss),
        "tokens_per_second": progress.tokens_per_second,
        "stopped": progress.stopped,
    }


def _best(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The arm of the lowest validation loss."""
    best, lowest = None, math.inf
    for outcome in outcomes:
        loss = outcome.progress.val_loss
        if outcome.progress.stopped != "diverged" and loss is not None and loss < lowest:
            best, lowest = outcome, loss
    return best
