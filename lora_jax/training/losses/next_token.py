"""The loss of the next token, over rows of packed examples."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.kernels.attention import Implementation
from lora_jax.models import DecoderConfig
from lora_jax.models.remat import Remat
from lora_jax.training.losses.fields import Field
from lora_jax.training.losses.final_states import final_states, read_out_of
from lora_jax.training.losses.loss import Batch, Loss
from lora_jax.training.losses.token_losses import token_losses
from lora_jax.transform import bind

_INTEGERS, _BOOLS = Field("rows positions", jnp.int32), Field("rows positions", jnp.bool_)
FIELDS = {
    "tokens": _INTEGERS,
    "targets": _INTEGERS,
    "loss_mask": _BOOLS,
    "segment_ids": _INTEGERS,
    "positions": _INTEGERS,
}


def next_token_loss(
    config: DecoderConfig,
    *,
    remat: Remat = "elementwise",
    unroll: int = 1,
    chunk: int = 128,
    attention: Implementation | None = None,
) -> Loss:
    """The summed cross-entropy of a batch's counted tokens, and their number.

    A batch holds, each `[B, T]`, `tokens`, `targets` (the token after each), `loss_mask` (where it
    counts), `segment_ids` (the example that a position belongs to, from 1; 0 is padding) and
    `positions` (within it); `next_token_batch` makes one of plain rows.

    Args:
      config: the model's shape.
      remat, unroll, attention: see `hidden_states`.
      chunk: see `token_losses`.
    """
    read = final_states(config, remat=remat, unroll=unroll, attention=attention)
    how: Any = {"chunk": chunk, "read_out": read_out_of(config)}

    def sums(delta, base, batch, dropout_key):
        hidden, head = read(bind(base, delta, dropout_key=dropout_key), batch)
        return token_losses(hidden, head, batch["targets"], batch["loss_mask"], **how)

    return Loss(
        name="next_token", fields=FIELDS, sums=sums, unit="token", positions=filled_positions
    )


def next_token_batch(tokens: Any) -> dict[str, jax.Array]:
    """The batch of `tokens [B, T + 1]` in which each row is one example, and every token but the
    first counts."""
    tokens = jnp.asarray(tokens)
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": jnp.ones((rows, length), bool),
        "segment_ids": jnp.ones((rows, length), jnp.int32),
        "positions": jnp.tile(jnp.arange(length, dtype=jnp.int32), (rows, 1)),
    }


def filled_positions(batch: Batch) -> Any:
    """How many positions belong to an example."""
    return (batch["segment_ids"] > 0).sum()
