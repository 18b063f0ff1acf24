"""The loss that a config names."""

from typing import Any

from ml_collections import ConfigDict

from experiments.harness import devices
from experiments.harness.encoding import ENCODE, Encode
from lora_jax.models import DecoderConfig
from lora_jax.training.losses import LOSSES, Entry
from lora_jax.training.losses.loss import Loss
from lora_jax.weights import PyTree

BATCHES = tuple(ENCODE)  # that `lora_jax.data` makes


def require_batches(config: ConfigDict) -> None:
    """Raises ValueError for an unknown loss, or one whose batches the data pipeline cannot make."""
    batches = _entry(config).batches
    if batches not in BATCHES:
        ours = ", ".join(name for name, entry in LOSSES.items() if entry.batches in BATCHES)
        raise ValueError(
            f"config.train.loss={config.train.loss!r} takes {batches} batches, and the sources of "
            f"config.data make {', '.join(BATCHES)} batches alone. Choose a loss of these, {ours}, "
            "or give training.train_step batches of your own."
        )


def encode_of(config: ConfigDict) -> Encode:
    """How records become examples of the loss. Raises ValueError as `require_batches`."""
    require_batches(config)
    return ENCODE[_entry(config).batches]


def learning_by(config: ConfigDict, loss: str) -> ConfigDict:
    """The config with another loss; an empty name is the config's own.

    Raises:
      ValueError: for an unknown loss.
    """
    if loss in ("", config.train.loss):
        return config
    config = config.copy_and_resolve_references()
    config.train.loss = loss
    _entry(config)
    return config


def make_loss(config: ConfigDict, shape: DecoderConfig, **options: Any) -> Loss:
    """The loss of a model of this shape on one device; `options` are its maker's.

    Raises:
      ValueError: for an unknown loss.
    """
    attention = None if config.model.attention == "auto" else config.model.attention
    make = _entry(config).make
    return make(shape, remat=config.model.remat, attention=attention, **options)


def loss_of(config: ConfigDict, shape: DecoderConfig, params: PyTree) -> Loss:
    """The loss of a model of this shape, over the run's devices."""
    return devices.over_devices(config, params, make_loss(config, shape))


def _entry(config: ConfigDict) -> Entry:
    name = config.train.loss
    if name not in LOSSES:
        raise ValueError(f"config.train.loss={name!r}: expected one of {', '.join(LOSSES)}.")
    return LOSSES[name]
