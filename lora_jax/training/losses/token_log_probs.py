"""The log-probability of every counted target, for losses that weigh rows against each other.

As in `token_losses`, logits live for a chunk of positions at a time, and chunks in which none
counts are skipped. The weight of a position is known only after all are computed, so that the
backward pass computes a chunk's logits again: one product with the vocabulary more than
`token_losses`.
"""

import jax
import jax.numpy as jnp

from lora_jax.models import mixed_dtypes
from lora_jax.training.losses.chunks import (
    ReadOut,
    chunk_losses,
    chunks,
    counted_first,
    ungrouped,
)
from lora_jax.weights import Weight


def token_log_probs(
    hidden: jax.Array,
    head: jax.Array | Weight,
    targets: jax.Array,
    loss_mask: jax.Array,
    *,
    chunk: int = 128,
    read_out: ReadOut = mixed_dtypes.read_out,
) -> jax.Array:
    """`mask_i * log_softmax(hidden_i @ head)[target_i]`, `[B, T]` float32; 0 where none counts.

    Arguments and errors are those of `token_losses`.
    """
    length, _, order, *arrays = counted_first(hidden, head, targets, loss_mask, chunk)

    def step(_, cut):
        rows, targets, counted, index = cut
        losses = jax.lax.cond(
            counted.any(),
            lambda: chunk_losses(read_out, head, rows, targets, counted, index),
            lambda: jnp.zeros(counted.shape, jnp.float32),
        )
        return None, losses

    _, losses = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), None, chunks(length, *arrays))
    rows, positions = loss_mask.shape
    n = rows * positions // (order.shape[0] * order.shape[1])
    losses = jnp.moveaxis(losses, 0, 2).reshape(order.shape)
    losses = jnp.take_along_axis(losses, jnp.argsort(order[..., :n], axis=-1), axis=-1)
    return -ungrouped(losses, rows)
