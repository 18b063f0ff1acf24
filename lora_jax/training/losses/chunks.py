"""Positions of a batch cut into chunks, those that count first, and the losses of a chunk."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.adapted import Adapted
from lora_jax.context_mesh import FSDP, SEQUENCE, constrain, size
from lora_jax.weights import Weight

ReadOut = Callable[[jax.Array, Any], jax.Array]  # (rows [..., D], head) to logits [..., V]


class CountedFirst(NamedTuple):
    """A batch's positions in G x S groups, one for each device's rows and positions, padded to a
    multiple of a chunk; in each group those that count come first.

    Attributes:
      length: of a chunk.
      number: of all that count, float32.
      order: `[G, S, n]`, from where in its group each position is; padding repeats the last.
      rows: `[G, S, n, D]`, hidden states.
      targets: `[G, S, n]`.
      counted: `[G, S, n]`, bool.
    """

    length: int
    number: jax.Array
    order: jax.Array
    rows: jax.Array
    targets: jax.Array
    counted: jax.Array


def counted_first(
    hidden: jax.Array, head: Any, targets: jax.Array, loss_mask: jax.Array, chunk: int
) -> CountedFirst:
    """The positions of `[B, T, ...]` arrays in chunks of at most `chunk`; arguments and errors are
    those of `token_losses`."""
    if isinstance(head, Adapted) and head.adapter_ids is not None:
        raise ValueError(
            "the output head was bound with adapter_ids, an adapter for each row, and the loss "
            "multiplies it with positions of all rows together. Bind one adapter at a time, or "
            "leave the head (a tied embedding) out of the targets."
        )
    over = size(FSDP), size(SEQUENCE)
    hidden, targets, counts = (_grouped(x, *over) for x in (hidden, targets, loss_mask))
    length = min(chunk, counts.shape[-1])
    padding = -counts.shape[-1] % length
    order = jnp.argsort(~counts, axis=-1, stable=True)
    order = jnp.pad(order, ((0, 0), (0, 0), (0, padding)), mode="edge")
    counted = jnp.arange(order.shape[-1])[None, None] < counts.sum(-1, keepdims=True)
    rows = jnp.take_along_axis(hidden, order[..., None], axis=2)
    targets = jnp.take_along_axis(targets, order, axis=2)
    number = counts.sum().astype(jnp.float32)
    return CountedFirst(length, number, order, rows, targets, counted)


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


def ungrouped(x: jax.Array, rows: int) -> jax.Array:
    """`[groups, spans, n]` as `[B, T]`: the inverse."""
    groups, spans, n = x.shape
    x = x.reshape(groups, spans, rows // groups, n * groups // rows)
    return jnp.swapaxes(x, 1, 2).reshape(rows, -1)


def chunks(length: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """`[G, S, n, ...]` as `[n / length, G, S, length, ...]`, and the index of each chunk."""

    def cut(array):
        groups, spans, _, *rest = array.shape
        return jnp.moveaxis(array.reshape(groups, spans, -1, length, *rest), 2, 0)

    pieces = [cut(array) for array in arrays]
    return *pieces, jnp.arange(len(pieces[0]))


def chunk_losses(read_out: ReadOut, head: Any, rows, targets, counted, index) -> jax.Array:
    """`logsumexp(logits) - logits[target]` of each position `[G, S, length]` of the chunk of this
    index, float32; 0 where none counts, whatever such a row holds."""
    rows = jnp.where(counted[..., None], rows, 0)  # 0 times infinity would reach the gradient
    head = head.for_part(index) if isinstance(head, Weight) else head
    logits = read_out(rows, head).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)
