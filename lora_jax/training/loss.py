"""Cross-entropy over the positions that count, in chunks of them.

Logits of a whole batch never stand in memory: 8 x 4096 positions of Llama 3 would be 17 GB in
float32. A chunk's logits live for one step of a scan, which takes their gradient along at once, so
that the backward pass has no product with the vocabulary left to do. Chunks in which no position
counts are skipped.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapted import Adapted
from lora_jax.context_mesh import FSDP, SEQUENCE, constrain, size
from lora_jax.models.mixed_dtypes import read_out
from lora_jax.weights import Weight


def token_losses(
    hidden: jax.Array,
    head: jax.Array | Weight,
    targets: jax.Array,
    loss_mask: jax.Array,
    *,
    chunk: int = 128,
) -> tuple[jax.Array, jax.Array]:
    """The summed negative log-likelihood of the targets that count, and their number.

    `sum_i mask_i * (logsumexp(hidden_i @ head) - (hidden_i @ head)[target_i])`, float32.

    Args:
      hidden: `[B, T, D]`, what the output head reads.
      head: the output head, a weight `[D, V]` of any type.
      targets: `[B, T]` int32.
      loss_mask: `[B, T]` bool.
      chunk: how many positions of a device share one product with the vocabulary.

    Returns:
      The sum in nats and the count, both float32 scalars: what a mean over devices or over
      accumulated micro-batches needs.

    Raises:
      ValueError: for rows or positions that the mesh of the context does not divide; for a head
        that rows adapt differently.
    """
    if isinstance(head, Adapted) and head.adapter_ids is not None:
        raise ValueError(
            "the output head was bound with adapter_ids, an adapter for each row, and the loss "
            "multiplies it with positions of all rows together. Bind one adapter at a time, or "
            "leave the head (a tied embedding) out of the targets."
        )
    over = size(FSDP), size(SEQUENCE)
    # Rows and positions that lie on one device are a group of their own, [G, S, n].
    hidden, targets, counts = (_grouped(x, *over) for x in (hidden, targets, loss_mask))
    length = min(chunk, counts.shape[-1])
    padding = -counts.shape[-1] % length
    order = jnp.argsort(~counts, axis=-1, stable=True)
    order = jnp.pad(order, ((0, 0), (0, 0), (0, padding)), mode="edge")
    counted = jnp.arange(order.shape[-1])[None, None] < counts.sum(-1, keepdims=True)
    leaves, treedef = jax.tree.flatten(head)
    rows = jnp.take_along_axis(hidden, order[..., None], axis=2)
    targets = jnp.take_along_axis(targets, order, axis=2)
    total = _summed(length, treedef, rows, targets, counted, leaves)
    return total, counts.sum().astype(jnp.float32)


def _grouped(x: jax.Array, groups: int, spans: int) -> jax.Array:
    """`[B, T, ...]` as `[groups, spans, n, ...]`, each span of positions of each group of rows."""
    B, T, *rest = x.shape
    if B % groups or T % spans:
        raise ValueError(
            f"the loss of {B} rows of {T} positions cannot be split over {FSDP}={groups} and "
            f"{SEQUENCE}={spans}. Of an accumulated step these are the rows of one micro-batch: "
            f"choose a batch_size that accumulate x {groups} divides, and a seq_len that {spans} "
            "does."
        )
    x = x.reshape(groups, B // groups, spans, T // spans, *rest)
    x = jnp.swapaxes(x, 1, 2).reshape(groups, spans, -1, *rest)
    return constrain(x, FSDP, SEQUENCE)


def _chunk_loss(treedef, rows: jax.Array, targets, counted, index, leaves: list[Any]) -> jax.Array:
    head = treedef.unflatten(leaves)
    head = head.for_part(index) if isinstance(head, Weight) else head
    logits = read_out(rows, head).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0))


def _chunks(length: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """`[G, S, n, ...]` as `[n / length, G, S, length, ...]`, and the index of each chunk."""

    def cut(array):
        groups, spans, _, *rest = array.shape
        return jnp.moveaxis(array.reshape(groups, spans, -1, length, *rest), 2, 0)

    chunks = [cut(array) for array in arrays]
    return *chunks, jnp.arange(len(chunks[0]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(length: int, treedef, rows, targets, counted, leaves) -> jax.Array:
    def step(total, chunk):
        loss = jax.lax.cond(
            chunk[2].any(),
            lambda: _chunk_loss(treedef, *chunk, leaves),
            lambda: jnp.float32(0),
        )
        return total + loss, None

    total, _ = jax.lax.scan(step, jnp.float32(0), _chunks(length, rows, targets, counted))
    return total


def _summed_forward(length: int, treedef, rows, targets, counted, leaves):
    """The sum, and beside it the gradients of just what is being differentiated."""
    trained = [leaf.perturbed for leaf in leaves]
    leaves = [leaf.value for leaf in leaves]
    rows, targets, counted = rows.value, targets.value, counted.value

    def loss(chunk_rows, train_leaves, chunk_targets, chunk_counted, index):
        moving = iter(train_leaves)
        mixed = [
            next(moving) if trains else leaf for trains, leaf in zip(trained, leaves, strict=True)
        ]
        return _chunk_loss(treedef, chunk_rows, chunk_targets, chunk_counted, index, mixed)

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

    chunks = _chunks(length, rows, targets, counted)
    (total, head_gradient), row_gradient = jax.lax.scan(step, (jnp.float32(0), zero), chunks)
    gradients = iter(head_gradient)
    leaf_gradients = [
        next(gradients).astype(leaf.dtype) if trains else None
        for trains, leaf in zip(trained, leaves, strict=True)
    ]
    row_gradient = jnp.moveaxis(row_gradient, 0, 2).reshape(rows.shape)
    return total, (row_gradient, leaf_gradients)


def _summed_backward(length: int, treedef, gradients, cotangent):
    del length, treedef

    def scaled(gradient):
        return (cotangent * gradient.astype(jnp.float32)).astype(gradient.dtype)

    row_gradient, leaf_gradients = jax.tree.map(scaled, gradients)
    return row_gradient, None, None, leaf_gradients


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)
