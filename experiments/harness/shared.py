"""What the arms of a run have in common: model, data, loss, and how they are moved."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

import lora_jax as lora
from experiments.harness import devices, setup
from experiments.harness.arms import Arm
from experiments.harness.losses import learning_by, loss_of, require_batches
from lora_jax import data, training
from lora_jax.interop import Pretrained
from lora_jax.training import checkpoints
from lora_jax.training.execution import Execution
from lora_jax.training.losses.loss import Batch, Loss
from lora_jax.training.sweep import Sweep, make_sweep
from lora_jax.transform import Delta
from lora_jax.weights import PyTree

Log = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What arms learn, and how they are moved.

    Attributes:
      batches: of a data seed, the endless iterator that `fit` takes.
      identity: of a data seed, what tells these batches from those of another run.
      validation: the batches of a validation.
      sweep: of an arm, the steps of all arms that share its step.
      held_out: the records of the validation, to sample answers from.
      settings: checks and completes the settings of an arm's loss.
      base_loss: the untuned model's.
      unit: what losses are means over.
      positions: see `fit`.
    """

    batches: Callable[[int], Any]
    identity: Callable[[int], Mapping[str, Any]]
    validation: Sequence[Mapping[str, Any]]
    sweep: Callable[[Arm], Sweep]
    settings: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    held_out: Callable[[], Sequence[data.Record]]
    base_loss: float
    unit: str = "token"
    positions: Callable[[Any], Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    """What all arms of a run that learn by one loss have in common.

    Attributes:
      config: the run's, with that loss.
      model: its params placed on the devices.
      workdir: where checkpoints and adapters go.
      log: see `fit`.
      task: what the arms learn.
      by_loss: the same for arms of another loss, by its name.
    """

    config: ConfigDict
    model: Pretrained
    workdir: Path
    log: Log
    task: Task
    by_loss: Callable[[str], "Shared"]

    @functools.cached_property
    def fingerprint(self) -> str:
        return checkpoints.fingerprint(self.model.params)

    @property
    def base(self) -> dict[str, Any]:
        """The untuned model, as results hold it."""
        return {
            "name": self.model.name,
            "source": self.model.source,
            "val_loss": self.task.base_loss,
            "unit": self.task.unit,
        }


Load = Callable[[ConfigDict, Path, Log], Shared]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """Both splits as tokens, for the rows of the config."""

    train: data.EncodedSource
    validation: data.EncodedSource


def prepared(config: ConfigDict, workdir: Path, log: Log, given: Examples | None = None) -> Shared:
    """The model and the data loaded and placed, and the untuned model's loss taken; `given` are the
    examples that the config names as data, where these are encoded already."""
    require_batches(config)  # refused before the model is loaded
    log({"event": "loading", "what": f"model {config.model.source}"})
    return _over(config, setup.load_model(config), workdir, log, given)


def _over(
    config: ConfigDict, model: Pretrained, workdir: Path, log: Log, given: Examples | None = None
) -> Shared:
    loss = loss_of(config, model.config, model.params)
    execution = devices.execution(config, model.params, loss.fields)
    model = dataclasses.replace(model, params=execution.base(model.params))
    if given is None:
        log({"event": "loading", "what": f"data {config.data.source}"})
    examples = given.train if given else setup.training_examples(config, model)
    validation = setup.validation_batches(config, model, given.validation if given else None)
    base_loss = mean_loss_over(validation, loss, model.params, execution)({})
    log({"event": "base", "val_loss": base_loss})

    def sweep(arm: Arm) -> Sweep:
        step = step_of(config, arm, loss, execution.axis_name)
        evaluate = functools.partial(_without_dropout, loss)
        return make_sweep(step, evaluate, config.sweep.mode, execution)

    @functools.cache
    def by_loss(name: str) -> Shared:
        if name in ("", config.train.loss):
            return shared
        return _over(learning_by(config, name), model, workdir, log)

    task = Task(
        batches=functools.partial(setup.training_batches, config, model, examples),
        identity=functools.partial(setup.data_identity, config, examples),
        validation=validation,
        sweep=sweep,
        held_out=lambda: setup.records(config, "validation"),
        settings=lambda given: loss.settings_of(**given),
        base_loss=base_loss,
        unit=loss.unit,
        positions=loss.positions,
    )
    shared = Shared(
        config=config, model=model, workdir=workdir, log=log, task=task, by_loss=by_loss
    )
    return shared


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


def mean_loss_over(
    batches: Sequence[Batch], loss: Loss, base: PyTree, execution: Execution
) -> Callable[[Delta], float]:
    """A delta's loss over all that counts in the batches, by one compiled program."""
    summed = execution.evaluate(functools.partial(_without_dropout, loss))

    def mean_loss(delta: Delta) -> float:
        with execution.context():
            sums = [jax.device_get(summed(delta, base, execution.batch(b))) for b in batches]
        return setup.mean_loss(sums, loss.unit)

    return mean_loss


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


def _without_dropout(loss: training.LossSum, delta: Delta, base: Any, batch: Any, **settings: Any):
    return loss(delta, base, batch, None, **settings)
