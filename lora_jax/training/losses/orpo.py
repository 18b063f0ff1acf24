"""ORPO: a preference learnt beside the chosen answer, without a reference model."""

from typing import Any

from lora_jax.models import DecoderConfig
from lora_jax.training import preference
from lora_jax.training.losses.loss import Loss
from lora_jax.training.losses.pairs import loss_of_pairs
from lora_jax.training.losses.settings import Number, defaults


def orpo_loss(config: DecoderConfig, *, beta: float = 0.1, **how: Any) -> Loss:
    """`preference.orpo` of a batch's pairs, summed, and their number; see `loss_of_pairs` for the
    batch.

    Args:
      config: the model's shape.
      beta: the weight of the preference, a setting.
      **how: remat, unroll, chunk, attention; see `target_log_probs`.

    Raises:
      ValueError: for a beta below zero.
    """
    settings = defaults("orpo_loss", {"beta": Number(beta, least=0)})
    return loss_of_pairs("orpo", preference.orpo, config, settings, **how)
