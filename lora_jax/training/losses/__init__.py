"""Losses by name, a line each; a loss is one file, which declares the batch that it takes."""

from collections.abc import Callable
from typing import NamedTuple

from lora_jax.training.losses.loss import Loss
from lora_jax.training.losses.next_token import next_token_loss
from lora_jax.training.losses.orpo import orpo_loss


class Entry(NamedTuple):
    """How a loss is made, and what it takes, whatever the model.

    Attributes:
      make: `(config, *, remat, unroll, chunk, attention) -> Loss`.
      batches: the name of the batches that it takes: "next-token", "preference".
    """

    make: Callable[..., Loss]
    batches: str


LOSSES = {
    "next_token": Entry(next_token_loss, batches="next-token"),
    "orpo": Entry(orpo_loss, batches="preference"),
}
