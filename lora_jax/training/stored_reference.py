"""The log-probabilities of a reference, computed once and stored in the examples."""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.data.batches import EncodedSource, one_a_row
from lora_jax.paths import described
from lora_jax.training.losses.loss import Batch
from lora_jax.training.losses.reference import STORED
from lora_jax.training.losses.target_log_probs import TargetLogProbs
from lora_jax.training.rounding import tolerance_of
from lora_jax.transform import Delta, bind
from lora_jax.weights import PyTree

Source = TypeVar("Source", bound=EncodedSource)


def store_reference(
    read: TargetLogProbs,
    base: PyTree,
    source: Source,
    *,
    batch_size: int,
    seq_len: int,
    reference: Delta | None = None,
) -> Source:
    """The source whose examples hold `reference_log_probs` too, an entry for each target, which
    batches carry as they carry the targets: what a loss with `stored_reference` reads.

    Args:
      read: from `target_log_probs`.
      base: the frozen tree.
      source: encoded pairs or judged answers.
      batch_size: how many are computed at once.
      seq_len: positions of a row, as in training.
      reference: the adapter of the reference; None for the base.
    """
    weights, compiled, examples = bind(base, reference or {}), jax.jit(read), list(source.examples)
    batches = one_a_row(examples, batch_size=batch_size, seq_len=seq_len)
    found = np.concatenate([np.asarray(compiled(weights, batch)) for batch in batches])
    return dataclasses.replace(source, examples=list(map(_with, examples, found)))


def _with(example, log_probs):
    """`log_probs [T]`, or `[2, T]` of an `answer_pair`."""
    if "tokens" in example:
        return example | {STORED: log_probs[: len(example["tokens"])]}
    sides = {
        f"{side}/{STORED}": log_probs[side][: len(example[f"{side}/tokens"])] for side in range(2)
    }
    return example | sides


def require_reference(
    read: TargetLogProbs,
    base: PyTree,
    batch: Batch,
    *,
    reference: Delta | None = None,
    tolerance: float | None = None,
) -> None:
    """Checks that a batch's stored log-probabilities are this reference's, by computing them: a
    pass over one batch, before a run.

    Args:
      read: from `target_log_probs`.
      base: the frozen tree.
      batch: with `reference_log_probs`.
      reference: the adapter of the reference; None for the base.
      tolerance: nats a token by which a row may differ on average; None takes
        `tolerance_of(base)`.

    Raises:
      ValueError: for a batch without them; naming the row and the difference, where they are those
        of another base or adapter.
    """
    most = tolerance_of(base) if tolerance is None else tolerance
    if STORED not in batch:
        raise ValueError(
            f"the batch lacks {STORED}: it holds {', '.join(map(str, batch))}. Compute them once, "
            "with store_reference."
        )
    found, shape = batch[STORED], jnp.shape(batch["tokens"])
    if jnp.shape(found) != shape:
        raise ValueError(f"{STORED} is {described(found)}: expected the shape {shape} of tokens.")
    ours = jax.jit(read)(bind(base, reference or {}), batch)
    counted = np.asarray(batch["loss_mask"]).reshape(shape[0], -1)
    gaps = np.abs(np.asarray(ours) - np.asarray(found)).reshape(shape[0], -1)
    means = np.where(counted, gaps, 0).sum(-1) / np.maximum(counted.sum(-1), 1)
    row = int(np.argmax(np.where(np.isnan(means), np.inf, means)))
    if not means[row] <= most:
        raise ValueError(
            f"{STORED} of row {row} differ from this reference's by {means[row]:.3g} nats a token, "
            f"more than {most:g}: they are those of another base or adapter, or of other "
            "tokens. Compute them again, by store_reference."
        )
