"""What became of an arm."""

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
    """What became of an arm: its delta, its own shapes restored, and its progress.

    The delta is one of the model as loaded, also where training began by correcting that.
    """

    arm: Arm
    delta: Delta
    progress: ArmProgress
    counts: lora.Description


def row(outcome: Outcome) -> dict[str, Any]:
    """What `results.json` says of an arm."""
    arm, progress, counts = outcome.arm, outcome.progress, outcome.counts
    loss = None if progress.stopped == "diverged" else progress.val_loss
    return {
        "name": arm.name,
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
        "perplexity": None if loss is None else math.exp(loss),
        "tokens_per_second": progress.tokens_per_second,
        "stopped": progress.stopped,
    }


def best(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The arm of the lowest validation loss."""
    found, lowest = None, math.inf
    for outcome in outcomes:
        loss = outcome.progress.val_loss
        if outcome.progress.stopped != "diverged" and loss is not None and loss < lowest:
            found, lowest = outcome, loss
    return found
