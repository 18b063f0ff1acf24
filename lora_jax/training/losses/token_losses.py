"""Cross-entropy over the positions that count, in chunks of them.

Logits of a full batch are never in memory: 8 x 4096 positions of Llama 3 would be 17 GB in
float32. A chunk's logits live for one step of a scan, which computes their gradient at once, so
that the backward pass has no product with the vocabulary left. Chunks in which no position
counts are skipped.
"""

import functools

import jax
import jax.numpy as jnp

from lora_jax.models import mixed_dtypes
from lora_jax.training.losses.chunks import ReadOut, chunk_losses, chunks, counted_first
from lora_jax.weights import Weight


def token_losses(
    hidden: jax.Array,
    head: jax.Array | Weight,
    targets: jax.Array,
    loss_mask: jax.Array,
    *,
    chunk: int = 128,
    read_out: ReadOut = mixed_dtypes.read_out,
) -> tuple[jax.Array, jax.Array]:
    """The summed negative log-likelihood of the targets that count, and their number.

    `sum_i mask_i * (logsumexp(hidden_i @ head) - (hidden_i @ head)[target_i])`, float32.

    Args:
      hidden: `[B, T, D]`, what the output head reads.
      head: the output head, a weight `[D, V]` of any type.
      targets: `[B, T]` int32.
      loss_mask: `[B, T]` bool.
      chunk: how many positions of a device share one product with the vocabulary.
      read_out: `(rows [..., D], head) -> logits [..., V]`, hashable: of families whose logits are
        more than the product, such as capped ones.

    Returns:
      The sum in nats and the count, both float32 scalars: what a mean over devices or over
      accumulated micro-batches needs.

    Raises:
      ValueError: for rows or positions that the mesh of the context does not divide; for a head
        that rows adapt differently.
    """
    length, count, _, *arrays = counted_first(hidden, head, targets, loss_mask, chunk)
    leaves, treedef = jax.tree.flatten(head)
    total = _summed(length, read_out, treedef, *arrays, leaves)
    return total, count


def _chunk_loss(read_out: ReadOut, treedef, rows, targets, counted, index, leaves) -> jax.Array:
    head = treedef.unflatten(leaves)
    return jnp.sum(chunk_losses(read_out, head, rows, targets, counted, index))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _summed(length: int, read_out: ReadOut, treedef, rows, targets, counted, leaves) -> jax.Array:
    def step(total, chunk):
        loss = jax.lax.cond(
            chunk[2].any(),
            lambda: _chunk_loss(read_out, treedef, *chunk, leaves),
            lambda: jnp.float32(0),
        )
        return total + loss, None

    total, _ = jax.lax.scan(step, jnp.float32(0), chunks(length, rows, targets, counted))
    return total


def _summed_forward(length: int, read_out: ReadOut, treedef, rows, targets, counted, leaves):
    """The sum, and the gradients of those arguments that are differentiated."""
    trained = [leaf.perturbed for leaf in leaves]
    leaves = [leaf.value for leaf in leaves]
    rows, targets, counted = rows.value, targets.value, counted.value

    def loss(chunk_rows, train_leaves, chunk_targets, chunk_counted, index):
        moving = iter(train_leaves)
        mixed = [
            next(moving) if trains else leaf for trains, leaf in zip(trained, leaves, strict=True)
        ]
        return _chunk_loss(
            read_out, treedef, chunk_rows, chunk_targets, chunk_counted, index, mixed
        )

    train_leaves = [leaf for trains, leaf in zip(trained, leaves, strict=True) if trains]
    zero = [jnp.zeros(leaf.shape, jnp.float32) for leaf in train_leaves]

    def step(carry, chunk):
        total, head_gradient = carry
        chunk_rows, chunk_targets, chunk_counted, index = chunk

        def counts():
            value, (row_gradient, more) = jax.value_and_grad(loss, argnums=(0, 1))(
                chunk_rows, train_leaves, chunk_targets, chunk_counted, index
            )
            return value, row_gradient, [leaf.astype(jnp.float32) for leaf in more]

        def skipped():
            return jnp.float32(0), jnp.zeros_like(chunk_rows), zero

        value, row_gradient, more = jax.lax.cond(chunk_counted.any(), counts, skipped)
        return (total + value, jax.tree.map(jnp.add, head_gradient, more)), row_gradient

    (total, head_gradient), row_gradient = jax.lax.scan(
        step, (jnp.float32(0), zero), chunks(length, rows, targets, counted)
    )
    gradients = iter(head_gradient)
    leaf_gradients = [
        next(gradients).astype(leaf.dtype) if trains else None
        for trains, leaf in zip(trained, leaves, strict=True)
    ]
    row_gradient = jnp.moveaxis(row_gradient, 0, 2).reshape(rows.shape)
    return total, (row_gradient, leaf_gradients)


def _summed_backward(length: int, read_out: ReadOut, treedef, gradients, cotangent):
    del length, read_out, treedef

    def scaled(gradient):
        return (cotangent * gradient.astype(jnp.float32)).astype(gradient.dtype)

    row_gradient, leaf_gradients = jax.tree.map(scaled, gradients)
    return row_gradient, None, None, leaf_gradients


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)
