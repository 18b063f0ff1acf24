"""KTO: answers that are desirable or not, without pairs, beside a reference model."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models import DecoderConfig
from lora_jax.training import preference
from lora_jax.training.losses import reference
from lora_jax.training.losses.fields import Field
from lora_jax.training.losses.loss import Loss
from lora_jax.training.losses.next_token import filled_positions
from lora_jax.training.losses.pairs import AXES, PAIRS, pairs_of
from lora_jax.training.losses.settings import Number, defaults
from lora_jax.training.losses.target_log_probs import target_log_probs
from lora_jax.transform import bind

JUDGED = PAIRS | {"desirable": Field("rows positions", jnp.bool_)}


def kto_loss(
    config: DecoderConfig,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    stored_reference: bool = False,
    **how: Any,
) -> Loss:
    """`preference.kto` of a batch's answers, summed, and their number.

    Fields are those of pairs, `[B, 2, T]`: first an answer with its prompt, then the prompt with
    the answer to another one, from which `kto_baseline` is estimated. `desirable [B, T]` says at
    each position whether the first one's answer is. An answer counts where it has a token that
    does.

    The baseline is that of the rows that are computed together: of a micro-batch where steps
    accumulate, of a device's rows under `pmap`, of the batch on a mesh. It needs several answers.

    Args:
      config: the model's shape.
      beta: how averse to risk the value is, a setting.
      desirable_weight, undesirable_weight: of the answers, settings.
      stored_reference: see `dpo_loss`.
      **how: remat, unroll, chunk, attention; see `target_log_probs`.

    Raises:
      ValueError: for a beta of at most zero, or a weight below zero.
    """
    settings = defaults(
        "kto_loss",
        {
            "beta": Number(beta, least=0, above=True),
            "desirable_weight": Number(desirable_weight, least=0),
            "undesirable_weight": Number(undesirable_weight, least=0),
        },
    )
    read = target_log_probs(config, **how)
    reference_of = reference.reference_log_probs(read, stored_reference)

    def sums(delta, base, batch, dropout_key, *, reference=None, **given):
        theirs = pairs_of(reference_of(base, batch, reference), batch)
        weights = bind(base, delta, dropout_key=dropout_key)
        first, second = (_slot(batch, i) for i in range(2))
        # No gradient reaches the other answers, so that theirs is a forward pass alone.
        mismatched = jax.lax.stop_gradient(read(jax.lax.stop_gradient(weights), second))
        policy = pairs_of(jnp.stack([read(weights, first), mismatched], 1), batch)
        baseline = preference.kto_baseline(policy.rejected, theirs.rejected)
        desirable = _of_segments(batch["desirable"], first["segment_ids"])
        losses = preference.kto(policy.chosen, theirs.chosen, desirable, baseline, **given)
        counted = policy.chosen.lengths > 0
        return jnp.where(counted, losses, 0.0).sum(), counted.sum().astype(jnp.float32)

    return Loss(
        name="kto",
        fields=JUDGED | (reference.reference_field(AXES) if stored_reference else {}),
        sums=sums,
        unit="answer",
        positions=filled_positions,
        settings=settings if stored_reference else {**settings, **reference.SETTINGS},
    )


def _slot(batch: Any, which: int) -> dict[str, jax.Array]:
    return {name: batch[name][:, which] for name in PAIRS}


def _of_segments(flags: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """`[B, T]`, at i whether a position of segment i + 1 has the flag."""

    def of_row(flags, segments):
        return jax.ops.segment_max(flags.astype(jnp.int32), segments, flags.shape[0] + 1)[1:] > 0

    return jax.vmap(of_row)(jnp.asarray(flags), jnp.asarray(segment_ids))
