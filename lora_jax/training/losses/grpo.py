"""GRPO and Dr. GRPO: rewarded answers, beside the group that each was sampled with."""

from typing import Any

import jax.numpy as jnp

from lora_jax.models import DecoderConfig
from lora_jax.training import policy
from lora_jax.training.losses import reference
from lora_jax.training.losses.fields import Field
from lora_jax.training.losses.loss import Loss
from lora_jax.training.losses.next_token import FIELDS, filled_positions
from lora_jax.training.losses.settings import Number, Setting, defaults
from lora_jax.training.losses.target_log_probs import sequences, target_log_probs
from lora_jax.transform import bind

AXES = "rows positions"
ROLLOUTS = FIELDS | {
    "sampler_log_probs": Field(AXES, jnp.float32),
    "advantages": Field(AXES, jnp.float32),
}


def grpo_loss(
    config: DecoderConfig,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    kl: float = 0.0,
    temperature: float = 1.0,
    stored_reference: bool = False,
    **how: Any,
) -> Loss:
    """The summed loss of a batch's answers, and their number: of each the mean over its tokens of

        policy.clipped(...) + kl * policy.k3(...)

    A batch holds the fields of `next_token_loss`, and at each position `sampler_log_probs`, with
    which its target was sampled, and `advantages`, that of its answer. With `kl` the reference is
    the base, in one more forward pass, or as `dpo_loss` has it; without it there is none.

    Args:
      config: the model's shape.
      clip, clip_high: how far a ratio may go below and above 1; `clip_high` None is `clip`.
        Settings.
      kl: the weight of the divergence from the reference, a setting unless it is 0.
      temperature: with which the answers were sampled.
      stored_reference: see `dpo_loss`.
      **how: remat, unroll, chunk, attention; see `target_log_probs`.

    Raises:
      ValueError: for a clip outside of [0, 1], or a `clip_high`, kl or temperature out of range.

    Source: Shao et al. 2024, arXiv:2402.03300, equation 3.
    """

    def summed(losses, batch):
        found = sequences(losses, batch)
        return found.means.sum(), (found.lengths > 0).sum()

    given = (clip, clip_high, kl, temperature, stored_reference)
    return _loss("grpo", config, summed, *given, **how)


def dr_grpo_loss(
    config: DecoderConfig,
    *,
    tokens: int | None = None,
    clip: float = 0.2,
    clip_high: float | None = None,
    kl: float = 0.0,
    temperature: float = 1.0,
    stored_reference: bool = False,
    **how: Any,
) -> Loss:
    """The same with the sum over an answer's tokens over a constant, `tokens`, so that a long
    answer that fails is not worth less a token than a short one. Its advantages are those of
    `group_advantages(scale=False)`.

    Args:
      tokens: the constant, such as `max_new_tokens`; None takes the positions of a row.

    The others, and errors, are those of `grpo_loss`.

    Source: Liu et al. 2025, arXiv:2503.20783, section 3.2.
    """
    if tokens is not None and tokens < 1:
        raise ValueError(f"dr_grpo_loss(tokens={tokens}): expected at least 1, or None.")

    def summed(losses, batch):
        found = sequences(losses, batch)
        constant = losses.shape[-1] if tokens is None else tokens
        return found.log_probs.sum() / constant, (found.lengths > 0).sum()

    given = (clip, clip_high, kl, temperature, stored_reference)
    return _loss("dr_grpo", config, summed, *given, **how)


def _loss(name, config, summed, clip, clip_high, kl, temperature, stored, **how) -> Loss:
    settings: dict[str, Setting] = {
        "clip": Number(clip, least=0, most=1),
        "clip_high": Number(clip if clip_high is None else clip_high, least=0),
        "kl": Number(kl, least=0),
    }
    defaults(f"{name}_loss", settings | {"temperature": Number(temperature, least=0, above=True)})
    fields = ROLLOUTS
    if not kl:
        del settings["kl"]
    elif stored:
        fields = ROLLOUTS | reference.reference_field(AXES)
    else:
        settings = {**settings, **reference.SETTINGS}
    read = target_log_probs(config, temperature=temperature, **how)
    reference_of = reference.reference_log_probs(read, stored)

    def sums(delta, base, batch, dropout_key, *, clip, clip_high, kl=None, reference=None):
        log_probs = read(bind(base, delta, dropout_key=dropout_key), batch)
        given = (
            jnp.where(batch["loss_mask"], jnp.asarray(batch[field], jnp.float32), 0.0)
            for field in ("sampler_log_probs", "advantages")
        )
        losses = policy.clipped(log_probs, *given, low=clip, high=clip_high)
        if kl is not None:
            losses += kl * policy.k3(log_probs, reference_of(base, batch, reference))
        total, count = summed(jnp.where(batch["loss_mask"], losses, 0.0), batch)
        return total, count.astype(jnp.float32)

    return Loss(
        name=name,
        fields=fields,
        sums=sums,
        unit="answer",
        positions=filled_positions,
        settings=settings,
    )
