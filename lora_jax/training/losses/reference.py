"""The reference of a loss: the base, another adapter on it, or its stored log-probabilities."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

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
