"""Log-probabilities of a batch's targets, position by position and example by example."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.kernels.attention import Implementation
from lora_jax.models import DecoderConfig
from lora_jax.models.remat import Remat
from lora_jax.training.losses.final_states import final_states, read_out_of
from lora_jax.training.losses.next_token import FIELDS
from lora_jax.training.losses.token_log_probs import token_log_probs
from lora_jax.training.preference import Sequences
from lora_jax.weights import PyTree

TargetLogProbs = Callable[[PyTree, Any], jax.Array]  # (weights, batch) to [..., T]


def target_log_probs(
    config: DecoderConfig,
    *,
    remat: Remat = "elementwise",
    unroll: int = 1,
    chunk: int = 128,
    attention: Implementation | None = None,
    temperature: float = 1.0,
) -> TargetLogProbs:
    """The function `(weights, batch) -> log_probs`, float32, of each position's target; 0 where
    `loss_mask` is false.

    A batch holds the fields of `next_token_loss`, of the shape `[..., T]`, such as `[B, 2, T]` for
    pairs. What it returns for `bind(base, {})` is what a loss with `stored_reference` reads as the
    batch's `reference_log_probs`.

    Args:
      config: the model's shape.
      remat, unroll, attention: see `hidden_states`.
      chunk: see `token_losses`.
      temperature: of the distribution; logits are divided by it.
    """
    read = final_states(config, remat=remat, unroll=unroll, attention=attention)
    logits = read_out_of(config)

    def read_out(rows, head):
        return logits(rows, head) / temperature

    how: Any = {"chunk": chunk, "read_out": logits if temperature == 1 else read_out}

    def log_probs(weights, batch):
        shape = jnp.shape(batch["tokens"])
        rows = {name: jnp.reshape(batch[name], (-1, shape[-1])) for name in FIELDS}
        hidden, head = read(weights, rows)
        return token_log_probs(hidden, head, rows["targets"], rows["loss_mask"], **how).reshape(
            shape
        )

    return log_probs


def sequences(log_probs: jax.Array, batch: Any) -> Sequences:
    """The examples of each row, `[..., T]` of `[..., T]`: at i the one of segment i + 1, of length
    0 where there is none or none of its targets counts."""

    def by_segment(values):
        def of_row(values, segments):
            return jax.ops.segment_sum(values, segments, values.shape[0] + 1)[1:]

        flat = (jnp.reshape(x, (-1, x.shape[-1])) for x in (values, batch["segment_ids"]))
        return jax.vmap(of_row)(*flat).reshape(values.shape)

    lengths = by_segment(jnp.asarray(batch["loss_mask"], jnp.int32))
    return Sequences(by_segment(log_probs), lengths)
