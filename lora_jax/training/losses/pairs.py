"""A loss of pairs, from its equation: what DPO, IPO, SimPO and ORPO have in common."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models import DecoderConfig
from lora_jax.training.losses import reference
from lora_jax.training.losses.fields import Field
from lora_jax.training.losses.loss import Loss
from lora_jax.training.losses.next_token import FIELDS, filled_positions
from lora_jax.training.losses.settings import Settings
from lora_jax.training.losses.target_log_probs import sequences, target_log_probs
from lora_jax.training.preference import Pairs
from lora_jax.transform import bind

AXES = "rows 2 positions"  # chosen and rejected
PAIRS = {name: Field(AXES, field.dtype) for name, field in FIELDS.items()}


def loss_of_pairs(
    name: str, equation: Callable[..., jax.Array], config: DecoderConfig, settings: Settings, **how
) -> Loss:
    """The summed loss of a batch's pairs, and their number, without a reference.

    A row holds one pair or several, its fields are `next_token_loss`'s with an axis of two in
    between, `[B, 2, T]`: answers, each with its prompt, which `loss_mask` leaves out. The segment
    of a chosen answer is that of its rejected one. A pair counts where both have a token that does.

    Args:
      name: of the loss.
      equation: `(policy, **settings)` to the loss of each pair.
      config: the model's shape.
      settings: what the equation takes.
      **how: see `target_log_probs`.
    """
    read = target_log_probs(config, **how)

    def sums(delta, base, batch, dropout_key, **given):
        policy = pairs_of(read(bind(base, delta, dropout_key=dropout_key), batch), batch)
        return summed(equation(policy, **given), policy)

    return _loss(name, PAIRS, sums, settings)


def loss_beside_reference(
    name: str,
    equation: Callable[..., jax.Array],
    config: DecoderConfig,
    settings: Settings,
    *,
    stored: bool,
    **how: Any,
) -> Loss:
    """The same with an `equation` of `(policy, reference, **settings)`, where `stored` says that
    the batch holds the reference's log-probabilities; else the loss has the setting `reference`,
    an adapter."""
    read = target_log_probs(config, **how)
    reference_of = reference.reference_log_probs(read, stored)

    def sums(delta, base, batch, dropout_key, *, reference=None, **given):
        theirs = pairs_of(reference_of(base, batch, reference), batch)
        policy = pairs_of(read(bind(base, delta, dropout_key=dropout_key), batch), batch)
        return summed(equation(policy, theirs, **given), policy)

    if stored:
        return _loss(name, PAIRS | reference.reference_field(AXES), sums, settings)
    return _loss(name, PAIRS, sums, {**settings, **reference.SETTINGS})


def pairs_of(log_probs: jax.Array, batch: Any) -> Pairs:
    """The pairs of each row, `[B, T]`, of log-probabilities of targets `[B, 2, T]`."""
    both = sequences(log_probs, batch)
    first, second = (jax.tree.map(lambda x: x[:, i], both) for i in range(2))  # noqa: B023
    return Pairs(first, second)


def summed(losses: jax.Array, policy: Pairs) -> tuple[jax.Array, jax.Array]:
    """The sum over the pairs of which both answers have a token that counts, and their number."""
    counted = (policy.chosen.lengths > 0) & (policy.rejected.lengths > 0)
    return jnp.where(counted, losses, 0.0).sum(), counted.sum().astype(jnp.float32)


def _loss(name: str, fields: Any, sums: Any, settings: Settings) -> Loss:
    return Loss(
        name=name,
        fields=fields,
        sums=sums,
        unit="pair",
        positions=filled_positions,
        settings=settings,
    )
