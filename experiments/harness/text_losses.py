"""The losses of plain params on the task's validation split and on another text."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.harness import losses, setup
from lora_jax.interop import Pretrained
from lora_jax.training import next_token_batch
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
        of["text_loss"] = text_batches(model, text)

    def measured(params: PyTree) -> dict[str, float]:
        return {
            name: setup.mean_loss([jax.device_get(summed(params, b)) for b in batches], loss.unit)
            for name, batches in of.items()
        }

    return measured


def text_batches(model: Pretrained, path: Path) -> Sequence[Any]:
    """The first tokens of a text as rows, each of which begins anew.

    Raises:
      ValueError: for a file that is not there, or too short.
    """
    if not path.is_file():
        raise ValueError(f"--text={path}: there is no such file.")
    wanted = ROWS * (LENGTH + 1)
    tokens = model.tokenizer.encode(path.read_text()[: 20 * wanted])[:wanted]
    if len(tokens) < wanted:
        raise ValueError(f"--text={path} has {len(tokens)} tokens: expected at least {wanted}.")
    rows = np.asarray(tokens, np.int32).reshape(ROWS, LENGTH + 1)
    return [next_token_batch(rows)]
