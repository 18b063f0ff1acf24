"""SimPO: a preference between mean log-probabilities, with a margin and no reference model."""

from typing import Any

from lora_jax.models import DecoderConfig
from lora_jax.training import preference
from lora_jax.training.losses.loss import Loss
from lora_jax.training.losses.pairs import loss_of_pairs
from lora_jax.training.losses.settings import Number, defaults


def simpo_loss(config: DecoderConfig, *, beta: float = 2.0, gamma: float = 1.0, **how: Any) -> Loss:
    """`preference.simpo` of a batch's pairs, summed, and their number; see `loss_of_pairs` for the
    batch.

    Args:
      config: the model's shape.
      beta: scales the margin, a setting.
      gamma: the target margin, after scaling, a setting. The paper takes half of beta,
        or more.
      **how: remat, unroll, chunk, attention; see `target_log_probs`.

    Raises:
      ValueError: for a beta of at most zero, or a gamma below zero.
    """
    settings = {"beta": Number(beta, least=0, above=True), "gamma": Number(gamma, least=0)}
    return loss_of_pairs("simpo", preference.simpo, config, defaults("simpo_loss", settings), **how)
