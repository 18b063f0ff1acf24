"""The losses of plain params on the task's validation split and on another text."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.harness import losses, setup
from experiments.harness.other_text import text_batches
from lora_jax.interop import Pretrained
from lora_jax.weights import PyTree

ROWS, LENGTH = 8, 256  # of the other text


def losses_of(
    config: ConfigDict, model: Pretrained, text: Path | None
) -> Callable[[PyTree], dict[str, float]]:
    """A function of params: `val_loss`, and `text_loss` where there is a text, both by one compiled
    program each."""
    loss = losses.make_loss(config, model.config)
    summed = jax.jit(lambda params, batch: loss({}, params, batch, None))
    of: dict[str, Sequence[Any]] = {"val_loss": setup.validation_batches(config, model)}
    if text is not None:
        of["text_loss"] = text_batches(model, text, rows=ROWS, length=LENGTH)

    def measured(params: PyTree) -> dict[str, float]:
        return {
            name: setup.mean_loss([jax.device_get(summed(params, b)) for b in batches], loss.unit)
            for name, batches in of.items()
        }

    return measured
