"""The reference of a loss: the base, another adapter on it, or its stored log-probabilities."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.paths import described
from lora_jax.training.losses.fields import Field
from lora_jax.training.losses.loss import Batch
from lora_jax.training.losses.settings import Adapter, Settings
from lora_jax.training.losses.target_log_probs import TargetLogProbs
from lora_jax.transform import Delta, bind
from lora_jax.weights import PyTree

STORED = "reference_log_probs"  # the field of a batch
SETTINGS: Settings = {"reference": Adapter()}  # of a loss that computes them

ReferenceLogProbs = Callable[[PyTree, Batch, Delta | None], jax.Array]


def reference_field(axes: str) -> dict[str, Field]:
    """The field of stored log-probabilities, an entry for each target."""
    return {STORED: Field(axes, jnp.float32)}


def reference_log_probs(read: TargetLogProbs, stored: bool) -> ReferenceLogProbs:
    """`(base, batch, reference)` to the log-probability of each target, through which no gradient
    flows: those of the batch where they are stored, else those of the adapter `reference`."""

    def log_probs(base, batch, reference):
        if stored:
            counted = jnp.asarray(batch["loss_mask"])
            return jnp.where(counted, jnp.asarray(batch[STORED], jnp.float32), 0.0)
        return jax.lax.stop_gradient(read(bind(base, reference), batch))

    return log_probs


def require_reference(
    read: TargetLogProbs,
    base: PyTree,
    batch: Batch,
    *,
    reference: Delta | None = None,
    tolerance: float = 1e-2,
) -> None:
    """Checks that a batch's stored log-probabilities are this reference's, by computing them: a
    pass over one batch, before a run.

    Args:
      read: from `target_log_probs`.
      base: the frozen tree.
      batch: with `reference_log_probs`.
      reference: the adapter of the reference; None for the base.
      tolerance: nats by which an answer's mean may differ, as other hardware and dtypes make it.

    Raises:
      ValueError: for a batch without them; naming the row and the difference, where they are those
        of another base or adapter.
    """
    if STORED not in batch:
        raise ValueError(
            f"the batch lacks {STORED}: it holds {', '.join(map(str, batch))}. Compute them once, "
            "with training.store_reference."
        )
    found, shape = batch[STORED], jnp.shape(batch["tokens"])
    if jnp.shape(found) != shape:
        raise ValueError(f"{STORED} is {described(found)}: expected the shape {shape} of tokens.")
    ours = jax.jit(read)(bind(base, reference or {}), batch)
    counted = np.asarray(batch["loss_mask"]).reshape(shape[0], -1)
    gaps = np.abs(np.asarray(ours) - np.asarray(found)).reshape(shape[0], -1)
    means = np.where(counted, gaps, 0).sum(-1) / np.maximum(counted.sum(-1), 1)
    row = int(np.argmax(np.where(np.isnan(means), np.inf, means)))
    if not means[row] <= tolerance:
        raise ValueError(
            f"{STORED} of row {row} differ from this reference's by {means[row]:.3g} nats a token, "
            f"more than {tolerance:g}: they are those of another base or adapter, or of other "
            "tokens. Compute them again, with training.store_reference."
        )
