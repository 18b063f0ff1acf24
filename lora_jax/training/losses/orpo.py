"""ORPO: a preference learnt beside the chosen answer, without a reference model (Hong et al. 2024,
arXiv:2403.07691)."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.kernels.attention import Implementation
from lora_jax.models import DecoderConfig
from lora_jax.models.remat import Remat
from lora_jax.training.losses.fields import Field
from lora_jax.training.losses.final_states import final_states, read_out_of
from lora_jax.training.losses.loss import Loss
from lora_jax.training.losses.next_token import FIELDS, filled_positions
from lora_jax.training.losses.token_log_probs import token_log_probs
from lora_jax.transform import bind

PAIRS = {name: Field("rows 2 positions", field.dtype) for name, field in FIELDS.items()}


def orpo_loss(
    config: DecoderConfig,
    *,
    beta: float = 0.1,
    remat: Remat = "elementwise",
    unroll: int = 1,
    chunk: int = 128,
    attention: Implementation | None = None,
) -> Loss:
    """The summed loss of a batch's pairs, and their number. For the chosen answer w to a prompt and
    the rejected one l, `log P` is the mean log-probability of an answer's counted tokens, and

        loss = -log P(w) - beta * log sigmoid(log odds(w) - log odds(l)),  odds = P / (1 - P)

    (equations 4 to 7). A row is a pair, its fields are `next_token_loss`'s with an axis of two in
    between, chosen and rejected, `[B, 2, T]`: each with its prompt, which `loss_mask` leaves out. A
    pair counts where both answers have a token that does.

    Args:
      config: the model's shape.
      beta: the weight of the preference (lambda in the paper).
      remat, unroll, attention: see `hidden_states`.
      chunk: see `token_losses`.

    Raises:
      ValueError: for a beta below zero.
    """
    if not beta >= 0:
        raise ValueError(f"orpo_loss(beta={beta!r}): expected a number of at least 0.")
    read = final_states(config, remat=remat, unroll=unroll, attention=attention)
    how: Any = {"chunk": chunk, "read_out": read_out_of(config)}

    def sums(delta, base, batch, dropout_key):
        answers = {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in PAIRS}
        mask = answers["loss_mask"]
        hidden, head = read(bind(base, delta, dropout_key=dropout_key), answers)
        log_probs = token_log_probs(hidden, head, answers["targets"], mask, **how)
        lengths = mask.sum(-1)
        means = jnp.where(lengths > 0, log_probs.sum(-1) / jnp.maximum(lengths, 1), -1.0)
        chosen, rejected = means.reshape(-1, 2).T
        preference = jax.nn.log_sigmoid(log_odds(chosen) - log_odds(rejected))
        counted = (lengths > 0).reshape(-1, 2).all(-1)
        losses = jnp.where(counted, -chosen - beta * preference, 0.0)
        return losses.sum(), counted.sum().astype(jnp.float32)

    return Loss(name="orpo", fields=PAIRS, sums=sums, unit="pair", positions=filled_positions)


def log_odds(log_p: jax.Array) -> jax.Array:
    """`log(p / (1 - p))` of `log p`; of a p that rounds to 1, that of the float32 below."""
    log_p = jnp.minimum(log_p, -jnp.finfo(jnp.float32).epsneg)
    return log_p - jnp.log(-jnp.expm1(log_p))
