"""Losses by name, a line each; a loss is one file, which declares the batch that it takes."""

from collections.abc import Callable
from typing import NamedTuple

from lora_jax.training.losses.dpo import dpo_loss, dpo_norm_loss, ipo_loss
from lora_jax.training.losses.grpo import dr_grpo_loss, grpo_loss
from lora_jax.training.losses.kto import kto_loss
from lora_jax.training.losses.loss import Loss
from lora_jax.training.losses.next_token import next_token_loss
from lora_jax.training.losses.orpo import orpo_loss
from lora_jax.training.losses.simpo import simpo_loss


class Entry(NamedTuple):
    """How a loss is made, and what it takes, whatever the model.

    Attributes:
      make: `(config, *, remat, unroll, chunk, attention) -> Loss`.
      batches: the name of the batches that it takes: "next-token", "preference", "judged" or
        "rollouts".
    """

    make: Callable[..., Loss]
    batches: str


LOSSES = {
    "next_token": Entry(next_token_loss, batches="next-token"),
    "dpo": Entry(dpo_loss, batches="preference"),
    "dpo_norm": Entry(dpo_norm_loss, batches="preference"),
    "ipo": Entry(ipo_loss, batches="preference"),
    "simpo": Entry(simpo_loss, batches="preference"),
    "orpo": Entry(orpo_loss, batches="preference"),
    "kto": Entry(kto_loss, batches="judged"),
    "grpo": Entry(grpo_loss, batches="rollouts"),
    "dr_grpo": Entry(dr_grpo_loss, batches="rollouts"),
}
