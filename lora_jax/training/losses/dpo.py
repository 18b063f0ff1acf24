"""DPO and its kin: preferences by log-probabilities beside those of a reference model."""

from typing import Any

from lora_jax.models import DecoderConfig
from lora_jax.training import preference
from lora_jax.training.losses.loss import Loss
from lora_jax.training.losses.pairs import loss_beside_reference
from lora_jax.training.losses.settings import Number, Settings, defaults


def dpo_loss(
    config: DecoderConfig,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    stored_reference: bool = False,
    **how: Any,
) -> Loss:
    """`preference.dpo` of a batch's pairs, summed, and their number; see `loss_of_pairs` for the
    batch.

    The reference is the base, in one more forward pass; or an adapter, the setting `reference`; or
    log-probabilities in the batch, `reference_log_probs [B, 2, T]`, which `store_reference` adds.

    Args:
      config: the model's shape.
      beta: scales the margin, a setting.
      label_smoothing: the probability that a label is wrong, a setting.
      stored_reference: whether the batch holds the reference's log-probabilities.
      **how: remat, unroll, chunk, attention; see `target_log_probs`.

    Raises:
      ValueError: for a beta of at most zero, or a label_smoothing outside of [0, 0.5].
    """
    settings = _settings("dpo_loss", beta, label_smoothing)
    return loss_beside_reference(
        "dpo", preference.dpo, config, settings, stored=stored_reference, **how
    )


def dpo_norm_loss(
    config: DecoderConfig,
    *,
    beta: float = 5.0,
    label_smoothing: float = 0.0,
    stored_reference: bool = False,
    **how: Any,
) -> Loss:
    """`preference.dpo_norm`, DPO of means over tokens; arguments and errors are `dpo_loss`'s."""
    settings = _settings("dpo_norm_loss", beta, label_smoothing)
    return loss_beside_reference(
        "dpo_norm", preference.dpo_norm, config, settings, stored=stored_reference, **how
    )


def ipo_loss(
    config: DecoderConfig, *, beta: float = 0.1, stored_reference: bool = False, **how: Any
) -> Loss:
    """`preference.ipo`; arguments and errors are `dpo_loss`'s. The margin goes to 1 / (2 beta)."""
    settings = defaults("ipo_loss", {"beta": Number(beta, least=0, above=True)})
    return loss_beside_reference(
        "ipo", preference.ipo, config, settings, stored=stored_reference, **how
    )


def _settings(owner: str, beta: float, label_smoothing: float) -> Settings:
    smoothing = Number(label_smoothing, least=0, most=0.5)
    return defaults(
        owner, {"beta": Number(beta, least=0, above=True), "label_smoothing": smoothing}
    )
