"""The outcome of an arm."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import lora_jax as lora
from experiments.harness.arms import Arm
from lora_jax.training.fit import ArmProgress
from lora_jax.transform import Delta


@dataclasses.dataclass(frozen=True)
class Outcome:
    """An arm after training: its delta, in its own shapes, and its progress, at the end of
    training or, where `config.train.patience` is set, at its best validation."""

    arm: Arm
    delta: Delta
    progress: ArmProgress
    counts: lora.Description

    @property
    def diverged(self) -> bool:
        return self.progress.stopped == "diverged"

    @property
    def val_loss(self) -> float | None:
        """The delta's; None where the arm diverged since."""
        return None if self.diverged else self.progress.val_loss

    @property
    def order(self) -> float:
        """By which the best outcome comes first: `val_loss`, infinite where there is none."""
        return math.inf if self.val_loss is None else self.val_loss


def row(outcome: Outcome, unit: str) -> dict[str, Any]:
    """The record of an arm in `results.json`; `unit` is what its losses are means over."""
    arm, progress, counts = outcome.arm, outcome.progress, outcome.counts
    loss = outcome.val_loss
    return {
        "name": arm.name,
        "cell": arm.cell,
        "label": arm.label,
        "group": arm.group,
        "rank": arm.rank,
        "targets": arm.targets,
        "learning_rate": arm.learning_rate,
        "seed": arm.seed,
        "trainable_params": counts.trainable_params,
        "trainable_percent": counts.trainable_percent,
        "train_loss": progress.train_loss,
        "val_loss": loss,
        "perplexity": math.exp(loss) if loss is not None and unit == "token" else None,
        "tokens_per_second": progress.tokens_per_second,
        "stopped": progress.stopped,
    }


def best(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The arm of the lowest validation loss."""
    finite = (outcome for outcome in outcomes if outcome.order < math.inf)
    return min(finite, key=lambda outcome: outcome.order, default=None)
