"""The log-probability of every counted target, for losses that weigh rows against each other.

As in `token_losses`, logits live for a chunk of positions at a time, and chunks in which none
counts are skipped. The weight of a position is known only after all are computed, but it scales one
gradient: that of the position's log-probability by its row. Where the output head does not train,
this gradient is computed with the logits, and the backward pass has no product with the vocabulary
left. Where the head trains, the backward pass computes a chunk's logits again.
"""

import functools

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
    leaves, treedef = jax.tree.flatten(head)
    losses = _losses(length, read_out, treedef, *arrays, leaves)
    rows, positions = loss_mask.shape
    n = rows * positions // (order.shape[0] * order.shape[1])
    losses = jnp.take_along_axis(losses, jnp.argsort(order[..., :n], axis=-1), axis=-1)
    return -ungrouped(losses, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _losses(length: int, read_out: ReadOut, treedef, rows, targets, counted, leaves) -> jax.Array:
    """`[G, S, n]`, in chunks of `length`."""

    def step(_, cut):
        return None, _of_chunk(read_out, treedef, *cut, leaves)

    _, losses = jax.lax.scan(
        jax.checkpoint(step, prevent_cse=False), None, chunks(length, rows, targets, counted)
    )
    return _joined(losses, counted)


def _of_chunk(read_out: ReadOut, treedef, rows, targets, counted, index, leaves) -> jax.Array:
    head = treedef.unflatten(leaves)
    return jax.lax.cond(
        counted.any(),
        lambda: chunk_losses(read_out, head, rows, targets, counted, index),
        lambda: jnp.zeros(counted.shape, jnp.float32),
    )


def _losses_forward(length: int, read_out: ReadOut, treedef, rows, targets, counted, leaves):
    """The losses, and for the way back their gradients by the rows, or what these come from."""
    trained = [leaf.value if leaf.perturbed else None for leaf in leaves]
    frozen = [None if leaf.perturbed else leaf.value for leaf in leaves]
    rows, targets, counted = rows.value, targets.value, counted.value
    values = [leaf.value for leaf in leaves]
    if any(leaf is not None for leaf in trained):
        losses = _losses(length, read_out, treedef, rows, targets, counted, values)
        return losses, (None, (rows, targets, counted, trained, frozen))

    def step(_, cut):
        chunk_rows, chunk_targets, chunk_counted, index = cut

        def counts():
            def of_rows(rows):
                head = treedef.unflatten(values)
                return chunk_losses(read_out, head, rows, chunk_targets, chunk_counted, index)

            losses, back = jax.vjp(of_rows, chunk_rows)
            return losses, *back(jnp.ones_like(losses))

        def skipped():
            return jnp.zeros(chunk_counted.shape, jnp.float32), jnp.zeros_like(chunk_rows)

        return None, jax.lax.cond(chunk_counted.any(), counts, skipped)

    _, (losses, slopes) = jax.lax.scan(step, None, chunks(length, rows, targets, counted))
    return _joined(losses, counted), (_joined(slopes, rows), None)


def _losses_backward(length: int, read_out: ReadOut, treedef, saved, cotangent):
    slopes, again = saved
    if again is None:
        scaled = (cotangent[..., None] * slopes.astype(jnp.float32)).astype(slopes.dtype)
        return scaled, None, None, None
    rows, targets, counted, trained, frozen = again

    def losses(rows, trained):
        pairs = zip(trained, frozen, strict=True)
        leaves = [still if moves is None else moves for moves, still in pairs]
        return _losses.__wrapped__(length, read_out, treedef, rows, targets, counted, leaves)

    row_gradient, leaf_gradients = jax.vjp(losses, rows, trained)[1](cotangent)
    return row_gradient, None, None, leaf_gradients


def _joined(pieces: jax.Array, like: jax.Array) -> jax.Array:
    """The chunks of a scan, `[n / length, G, S, length, ...]`, as `[G, S, n, ...]`."""
    return jnp.moveaxis(pieces, 0, 2).reshape(like.shape)


_losses.defvjp(_losses_forward, _losses_backward, symbolic_zeros=True)
