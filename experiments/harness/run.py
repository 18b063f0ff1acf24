"""A sweep from config and arms to results."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

import lora_jax as lora
from experiments.harness import adapters, devices, setup
from experiments.harness.arms import Arm, same_step, trained_together
from experiments.harness.losses import loss_of, require_batches
from experiments.harness.outcome import Outcome, best, row
from experiments.harness.samples import sample
from lora_jax import data, training
from lora_jax.interop import Pretrained
from lora_jax.parallel import hosts
from lora_jax.training import checkpoints
from lora_jax.training.execution import Execution
from lora_jax.training.fit import ArmProgress, Diverged, Schedule, fit
from lora_jax.training.losses.loss import Batch, Loss
from lora_jax.training.sweep import Sweep, make_sweep
from lora_jax.transform import Delta
from lora_jax.weights import PyTree

Log = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    """What all arms of a run have in common; `base_loss` is that of the untuned model."""

    config: ConfigDict
    model: Pretrained
    loss: Loss
    execution: Execution
    examples: data.EncodedSource
    validation: Sequence[data.Batch]
    base_loss: float
    workdir: Path
    log: Log

    @functools.cached_property
    def fingerprint(self) -> str:
        return checkpoints.fingerprint(self.model.params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """Both splits as tokens, for the rows of the config."""

    train: data.EncodedSource
    validation: data.EncodedSource


def run(
    config: ConfigDict,
    arms: Sequence[Arm],
    workdir: Path,
    log: Log,
    *,
    sized: bool = False,
    examples: Examples | None = None,
) -> dict[str, Any]:
    """Trains all arms, on from where an earlier call ended; returns what `results.json` holds.

    Args:
      config: the run's.
      arms: the first of them.
      workdir: where checkpoints and adapters go.
      log: see `fit`.
      sized: see `conduct`.
      examples: what the config names as data, where that is encoded already.
    """
    started = time.time()
    devices.require_even_arms(config, arms)
    require_batches(config)  # these two are refused before the model is loaded
    optimizer(config, arms[0])
    shared = prepared(config, workdir, log, examples)
    if sized:
        setup.require_shape(config, shared.model)
    outcomes: list[Outcome] = []
    with hosts.preemption() as stop_requested:
        for group in same_step(arms):
            sweep = compiled_once(shared, group[0])
            for together in trained_together(group):
                outcomes += train(shared, together, sweep, stop_requested)
    if all(outcome.diverged for outcome in outcomes):
        raise ValueError(
            "the loss of every arm stopped being a number. Lower config.train.learning_rate, or "
            "warm up for longer; the checkpoints before are kept."
        )
    model = shared.model
    adapters.save(config, model, outcomes, workdir / "adapters", shared.fingerprint, log)
    return {
        "base": {"name": model.name, "source": model.source, "val_loss": shared.base_loss},
        "arms": [row(outcome) for outcome in outcomes],
        "samples": sample(config, model, best(outcomes), log),
        "seconds": time.time() - started,
    }


def prepared(config: ConfigDict, workdir: Path, log: Log, given: Examples | None = None) -> Shared:
    """The model and the data loaded and placed, and the untuned model's loss taken."""
    log({"event": "loading", "what": f"model {config.model.source}"})
    model = setup.load_model(config)
    loss = loss_of(config, model.config, model.params)
    execution = devices.execution(config, model.params, loss.fields)
    model = dataclasses.replace(model, params=execution.base(model.params))
    if given is None:
        log({"event": "loading", "what": f"data {config.data.source}"})
    examples = given.train if given else setup.training_examples(config, model)
    validation = setup.validation_batches(config, model, given.validation if given else None)
    base_loss = mean_loss(loss, {}, model.params, execution, validation)
    log({"event": "base", "val_loss": base_loss})
    return Shared(
        config=config,
        model=model,
        loss=loss,
        execution=execution,
        examples=examples,
        validation=validation,
        base_loss=base_loss,
        workdir=workdir,
        log=log,
    )


def step_of(
    config: ConfigDict, arm: Arm, loss: training.LossSum, axis_name: str | None = None
) -> training.TrainStep:
    """One step of an arm's training."""
    return training.train_step(
        loss,
        optimizer(config, arm),
        accumulate=config.train.accumulate,
        correct=lora.project_b() if arm.project_b else None,
        axis_name=axis_name,
    )


def mean_loss(
    loss: Loss, delta: Delta, base: PyTree, execution: Execution, batches: Sequence[Batch]
) -> float:
    """Over all that counts in the batches."""
    summed = execution.evaluate(functools.partial(_without_dropout, loss))
    with execution.context():
        sums = [jax.device_get(summed(delta, base, execution.batch(batch))) for batch in batches]
    return setup.mean_loss(sums, loss.unit)


def compiled_once(shared: Shared, arm: Arm) -> Sweep:
    """The steps of all arms that share this one's."""
    config, execution = shared.config, shared.execution
    step = step_of(config, arm, shared.loss, execution.axis_name)
    evaluate = functools.partial(_without_dropout, shared.loss)
    return make_sweep(step, evaluate, config.sweep.mode, execution)


def train(
    shared: Shared,
    arms: Sequence[Arm],
    sweep: Sweep,
    stop_requested: Callable[[], bool],
    give_up: Callable[[int, float], bool] | None = None,
) -> list[Outcome]:
    """Trains arms together through one step; `give_up` is `fit`'s."""
    config, model = shared.config, shared.model
    base, fresh = model.params, [_init_delta(arm, model.params) for arm in arms]
    names = [arm.name for arm in arms]
    shared.log({"event": "compiling", "arms": names})
    counts = [lora.describe(base, delta) for delta in fresh]
    try:
        states, progress = fit(
            sweep,
            _first_states(config, arms, fresh),  # held by nobody else: full ones are large
            base,
            arms=names,
            batches=setup.training_batches(config, model, shared.examples, arms[0].data_seed),
            validation=shared.validation,
            schedule=_schedule(config),
            folder=shared.workdir / "checkpoints" / arms[0].folder,
            identity={
                "base": shared.fingerprint,
                **setup.data_identity(config, shared.examples, arms[0].data_seed),
            },
            log=shared.log,
            positions=shared.loss.positions,
            stop_requested=stop_requested,
            give_up=give_up,
        )
    except Diverged:
        lost = [ArmProgress(stopped="diverged") for _ in arms]
        return [Outcome(*parts) for parts in zip(arms, fresh, lost, counts, strict=True)]
    trained = [state.delta for state in states]
    return [Outcome(*parts) for parts in zip(arms, trained, progress, counts, strict=True)]


def _first_states(
    config: ConfigDict, arms: Sequence[Arm], fresh: Sequence[Delta]
) -> list[training.TrainState]:
    tx = optimizer(config, arms[0])
    return [
        training.init_state(delta, tx, learning_rate=arm.learning_rate, seed=arm.seed)
        for arm, delta in zip(arms, fresh, strict=True)
    ]


def _init_delta(arm: Arm, params: PyTree) -> Delta:
    def init(params, key):
        return lora.lora_transform(params, arm.method, targets=arm.targets, key=key)[1]

    return jax.jit(init)(params, jax.random.key(arm.seed))


def _without_dropout(loss: training.LossSum, delta: Delta, base: Any, batch: Any):
    return loss(delta, base, batch, None)


def optimizer(config: ConfigDict, arm: Arm) -> optax.GradientTransformationExtraArgs:
    """The optimizer as configured, with what the arm's method does to it."""
    settings = config.train
    tx = training.optimizer(
        settings.optimizer,
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
    if arm.b_ratio != 1:
        tx = optax.chain(tx, lora.scale_b(arm.b_ratio))
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
