"""The loop: steps, validation, checkpoints, and arms that stop early or diverge."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.training import checkpoints
from lora_jax.training.losses.loss import Batch
from lora_jax.training.resuming import digest, peek, require_same_init, with_hyperparams_of
from lora_jax.training.step import TrainState
from lora_jax.training.sweep import Sweep, arms_of, chosen, copied, deltas_of
from lora_jax.weights import PyTree

GIVEN_UP = "given up"
RECENT = 10  # steps whose mean is an arm's training loss
Log = Callable[[dict[str, Any]], None]


class Diverged(ValueError):  # noqa: N818
    """The loss of every arm has stopped being a number; the checkpoint before is kept."""


class Preempted(Exception):  # noqa: N818
    """The run was stopped before its last step; a checkpoint of that step is saved."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """When things happen, in steps.

    Attributes:
      steps: how many updates to make.
      eval_every: validates after so many steps, and after the last.
      checkpoint_every: saves after so many steps, and after the last.
      log_every: waits for the device and logs after so many steps.
      patience: stops an arm after so many validations without a new best; None never does. With
        it every arm, stopped or not, ends with the delta of its best validation.
    """

    steps: int
    eval_every: int
    checkpoint_every: int
    log_every: int = 1
    patience: int | None = None


@dataclasses.dataclass
class ArmProgress:
    """What is known of an arm beside its state; saved in the checkpoint as JSON.

    Attributes:
      recent: the losses of the last steps in which anything counted.
      val_loss: of the last validation; of what `fit` returns, that of the returned delta.
      best: the lowest of them.
      best_step: when that was.
      waited: validations since.
      tokens, seconds: what training took; `tokens` are positions of batches that are no padding.
      stopped: "early", "diverged", "given up", or None.
    """

    recent: list[float] = dataclasses.field(default_factory=list)
    val_loss: float | None = None
    best: float | None = None
    best_step: int | None = None
    waited: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stopped: str | None = None

    @property
    def train_loss(self) -> float | None:
        return sum(self.recent) / len(self.recent) if self.recent else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.tokens and self.seconds else None


def fit(
    sweep: Sweep,
    states: Sequence[TrainState],
    base: PyTree,
    *,
    arms: Sequence[str],
    batches: Any,
    validation: Sequence[Batch],
    schedule: Schedule,
    folder: Path,
    identity: Mapping[str, Any],
    log: Log,
    positions: Callable[[Batch], Any] | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    give_up: Callable[[int, float], bool] | None = None,
) -> tuple[list[TrainState], list[ArmProgress]]:
    """Trains all arms in step on the same batches, from the newest checkpoint if there is one.

    Args:
      sweep: how arms move, from `make_sweep`.
      states: their initial states, each in its own shapes. The memory of those that the caller
        does not hold is freed. In a resumed run, hyperparameters of the optimizer, such as the
        learning rate, are those given here; a seed or a frozen leaf, such as LoRA's scale, must be
        that of the checkpoint.
      base: the frozen tree.
      arms: their names.
      batches: an endless iterator of batches with `get_state` and `set_state`.
      validation: the batches of a validation.
      schedule: when what happens.
      folder: of the checkpoints.
      identity: what a checkpoint must agree with, by name, such as the fingerprints of the base
        and the data. The arms, the first batch and those of the validation belong to it anyway.
      log: called with a JSON-like record of every logged step and validation of every arm, and of
        every event: `{"event": "resumed" | "stopped" | ...}`.
      positions: returns how many positions of a batch are not padding, `loss.positions`; without
        it tokens a second are not logged.
      stop_requested: called after every step that waits for the device; True ends the run early.
      give_up: called with the step and an arm's loss at every validation but the last; True stops
        that arm.

    Returns:
      Each arm's last state and its progress; with `schedule.patience`, the state's delta is that
      of the best validation.

    Raises:
      ValueError: for a checkpoint of another run or a damaged one; see `checkpoints.restore`.
      Diverged: a ValueError, when the loss of every arm has stopped being a number: the step.
      Preempted: when `stop_requested` returned True, after saving a checkpoint.
    """
    packed, progress = sweep.pack(states), [ArmProgress() for _ in arms]
    del states  # whose copies train
    best = copied(deltas_of(packed)) if schedule.patience is not None else None
    identity = {
        **identity,
        "arms": list(arms),
        "early stopping": best is not None,
        "first batch": digest(peek(batches)),
        "validation batches": digest(list(validation)),
    }
    step = 0
    restored = checkpoints.restore(folder, (packed, best), identity=identity)
    if restored is not None:
        step, (there, best), position = restored
        require_same_init(folder, arms, sweep.unpack(packed), sweep.unpack(there))
        packed = with_hyperparams_of(packed, there)
        batches.set_state(position["data"])
        progress = [ArmProgress(**arm) for arm in position["arms"]]
    log({"event": "started", "step": step, "arms": list(arms), "steps": schedule.steps})

    window = _Window(arms, progress, log, positions)
    with checkpoints.saving(folder, identity=identity) as save:
        while step < schedule.steps and _any_running(progress):
            step += 1
            batch = next(batches)
            window.open()
            packed, metrics = sweep.step(packed, base, batch, [not arm.stopped for arm in progress])
            window.add(step, batch, metrics)
            last = step == schedule.steps
            evaluates = last or step % schedule.eval_every == 0
            saves = last or step % schedule.checkpoint_every == 0
            stops = False
            if evaluates or saves or step % schedule.log_every == 0:
                window.close()
                _raise_if_all_diverged(arms, progress, step)
                stops = stop_requested()
            if evaluates:
                losses = mean_losses(sweep, packed, base, validation)
                better = _judge(losses, arms, progress, step, schedule.patience, log)
                if give_up is not None and not last:
                    _give_up(give_up, arms, progress, step, log)
                best = None if best is None else chosen(better, deltas_of(packed), best)
            if saves or stops or not _any_running(progress):
                arm_records = [dataclasses.asdict(arm) for arm in progress]
                save(step, (packed, best), {"data": batches.get_state(), "arms": arm_records})
            if stops:
                raise Preempted(
                    f"asked to end after step {step} of {schedule.steps}, which is saved"
                )
    states = sweep.unpack(packed)
    return (states, progress) if best is None else _at_their_best(states, best, progress)


def mean_losses(
    sweep: Sweep, packed: PyTree, base: PyTree, validation: Sequence[Batch]
) -> list[float]:
    """Each arm's validation loss: nats a counted token, over all batches; 0 where none counts."""
    sums = [jax.device_get(sweep.evaluate(packed, base, batch)) for batch in validation]
    totals, counts = np.sum(np.asarray(sums, np.float64), axis=0)
    counted = counts > 0
    return np.where(counted, totals / np.where(counted, counts, 1), 0.0).tolist()


def _any_running(progress: Sequence[ArmProgress]) -> bool:
    return any(arm.stopped is None for arm in progress)


def _judge(losses, arms, progress, step: int, patience: int | None, log: Log) -> list[bool]:
    """Notes each running arm's validation loss, stops those that improve no more, and returns
    which have a new best."""
    better = [_improves(arm, loss) for arm, loss in zip(progress, losses, strict=True)]
    for name, arm, loss, improves in zip(arms, progress, losses, better, strict=True):
        if arm.stopped:
            continue
        arm.val_loss = loss
        arm.waited = 0 if improves else arm.waited + 1
        if improves:
            arm.best, arm.best_step = loss, step
        log({"step": step, "arm": name, "val_loss": loss})
        if patience is not None and arm.waited >= patience:
            arm.stopped = "early"
            log({"event": "stopped early", "arm": name, "step": step})
    return better


def _give_up(give_up, arms, progress, step: int, log: Log) -> None:
    for name, arm in zip(arms, progress, strict=True):
        if arm.stopped is None and give_up(step, arm.val_loss):
            arm.stopped = GIVEN_UP
            log({"event": GIVEN_UP, "arm": name, "step": step})


def _improves(arm: ArmProgress, loss: float) -> bool:
    runs = arm.stopped is None
    return runs and math.isfinite(loss) and (arm.best is None or loss < arm.best)


def _at_their_best(states, best: PyTree, progress: Sequence[ArmProgress]):
    deltas = arms_of(best, len(states))
    states = [dataclasses.replace(s, delta=d) for s, d in zip(states, deltas, strict=True)]
    return states, [dataclasses.replace(arm, val_loss=arm.best) for arm in progress]


def _raise_if_all_diverged(arms, progress, step: int) -> None:
    if all(arm.stopped == "diverged" for arm in progress):
        raise Diverged(
            f"the loss of {', '.join(arms)} is not a number any more at step {step}. Lower the "
            "learning rate, or warm up for longer; the checkpoint before is kept."
        )


class _Window:
    """The steps since the device was last waited for."""

    def __init__(
        self,
        arms: Sequence[str],
        progress: Sequence[ArmProgress],
        log: Log,
        positions: Callable[[Batch], Any] | None,
    ):
        self._arms, self._progress, self._log, self._positions = arms, progress, log, positions
        self._steps: list[tuple[int, Any, Any]] = []
        self._since = 0.0

    def open(self) -> None:
        if not self._steps:
            self._since = time.perf_counter()

    def add(self, step: int, batch: Batch, metrics: Any) -> None:
        # Still on its way, where the batch is.
        tokens = 0 if self._positions is None else self._positions(batch)
        self._steps.append((step, tokens, metrics))

    def close(self) -> None:
        """Waits for the device, and logs what each running arm did."""
        steps = jax.device_get(self._steps)
        running = [index for index, arm in enumerate(self._progress) if arm.stopped is None]
        seconds = (time.perf_counter() - self._since) / len(running)
        for index in running:
            self._log_arm(index, steps, seconds)
        self._steps = []

    def _log_arm(self, index: int, steps: list, seconds: float) -> None:
        arm, name = self._progress[index], self._arms[index]
        tokens = sum(int(tokens) for _, tokens, _ in steps)
        arm.tokens += tokens
        arm.seconds += seconds
        for step, _, metrics in steps:
            loss, norm = float(metrics.loss[index]), float(metrics.grad_norm[index])
            if not (math.isfinite(loss) and math.isfinite(norm)):
                arm.stopped = "diverged"
                self._log({"event": "diverged", "arm": name, "step": step})
                return
            if metrics.count is None or metrics.count[index] > 0:
                arm.recent = [*arm.recent, loss][-RECENT:]
            record = {"step": step, "arm": name, "loss": loss, "grad_norm": norm}
            rate = {} if self._positions is None else {"tokens_per_second": tokens / seconds}
            self._log(record | rate)
