"""Model and data as a config names them."""

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.harness import devices
from experiments.harness.losses import encode_of
from lora_jax import data, models, paths
from lora_jax.interop import Place, Pretrained, load, shapes_alone
from lora_jax.models import SHAPES, DecoderConfig
from lora_jax.quant import quantize
from lora_jax.training.records import flat
from lora_jax.training.resuming import digest
from lora_jax.weights import is_weight

_OPTIONAL = ("base.block_size", "base.double_quant", "data.validation_share", "train.epochs")


def require_filled(config: ConfigDict) -> None:
    """Raises ValueError for a setting that is to follow from the data, as in configs/finetune.py,
    where nothing makes it do so."""
    settings = flat(config.to_dict())
    for name in sorted(settings.keys() - {*_OPTIONAL}):
        if settings[name] is None:
            raise ValueError(
                f"config.{name} is None: experiments/finetune.py alone finds it from the data. "
                "Give it here, or take another --config."
            )


def shape_of(config: ConfigDict) -> DecoderConfig:
    """The model's shape, by name, without its weights."""
    name = config.model.shape
    if name not in SHAPES:
        raise ValueError(f"config.model.shape={name!r}: expected one of {', '.join(SHAPES)}.")
    return SHAPES[name]


def require_shape(config: ConfigDict, model: Pretrained) -> None:
    """Raises ValueError unless `config.model.shape` has the loaded model's sizes."""
    named = jax.eval_shape(lambda: models.init(shape_of(config), key=jax.random.key(0)))
    sizes = [
        {path: leaf.shape for path, leaf in paths.flatten(tree, is_leaf=is_weight).items()}
        for tree in (named, model.params)
    ]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"config.model.shape={config.model.shape!r}, by which the arms were sized, is not the "
            f"shape of {model.name}. Give the model's own: one of {', '.join(SHAPES)}; for another "
            "model, enter its shape in the `_SHAPES` of its family in lora_jax/models."
        )


def load_model(config: ConfigDict) -> Pretrained:
    """The pretrained model, or random weights of the named shape with a byte tokenizer; quantised
    where the config says so."""
    if config.model.source != "random":
        format = None if config.base.quantize == "none" else _format(config)
        with devices.while_loading(config):
            return _loaded(config, devices.placed(config, format))
    return _random(config, _random_params(config))


def model_without_weights(config: ConfigDict) -> Pretrained:
    """What `load_model` returns, its params the shapes of theirs; only packed weights are read."""
    if config.model.source == "random":
        return _random(config, jax.eval_shape(lambda: _random_params(config)))
    model = _loaded(config, shapes_alone)
    params = jax.eval_shape(lambda params: as_configured(config, params), model.params)
    return dataclasses.replace(model, params=params)


def _loaded(config: ConfigDict, place: Place) -> Pretrained:
    require_template(config)
    try:
        model = load(config.model.source, dtype=jnp.dtype(config.model.dtype), place=place)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} The option is --config.model.source=PATH.") from None
    return dataclasses.replace(model, tokenizer=_templated(config, model.tokenizer))


def require_template(config: ConfigDict) -> None:
    """Raises ValueError for an unknown template."""
    if config.data.template not in ("chat", "plain"):
        raise ValueError(
            f"config.data.template={config.data.template!r}: expected chat, the tokenizer's own, "
            "or plain."
        )


def _templated(config: ConfigDict, tokenizer: data.Tokenizer) -> data.Tokenizer:
    if config.data.template == "chat":
        return tokenizer
    return dataclasses.replace(tokenizer, chat_template=data.PLAIN)


def _random_params(config: ConfigDict) -> models.Params:
    dtype = jnp.dtype(config.model.dtype)
    params = models.init(shape_of(config), key=jax.random.key(0), dtype=dtype)
    return as_configured(config, params)


def _random(config: ConfigDict, params: models.Params) -> Pretrained:
    require_template(config)
    return Pretrained(
        params=params,
        config=shape_of(config),
        tokenizer=_templated(config, data.byte_tokenizer()),
        name=config.model.shape,
        source="random weights",
    )


def as_configured(config: ConfigDict, params: models.Params) -> models.Params:
    """The params with the base's format, concrete or abstract."""
    return params if config.base.quantize == "none" else quantize(params, **_format(config))


def _format(config: ConfigDict) -> dict[str, Any]:
    settings = config.base
    return {
        "format": settings.quantize,
        "block_size": settings.block_size,
        "double_quant": settings.double_quant,
    }


def records(config: ConfigDict, split: str) -> Sequence[data.Record]:
    """One split of the configured source."""
    settings = config.data
    return data.load_source(
        settings.source,
        split=split,
        path=settings.path or None,
        prompt_field=settings.prompt_field or None,
        response_field=settings.response_field or None,
        validation_path=settings.validation_path or None,
        held_out=_held_out(config),
    )


def _held_out(config: ConfigDict) -> data.HeldOut | None:
    settings = config.data
    if settings.validation_share is None or settings.source != "jsonl":
        return None
    return data.HeldOut(
        share=settings.validation_share, most=settings.validation_examples, seed=settings.seed
    )


def training_examples(config: ConfigDict, model: Pretrained) -> data.EncodedSource:
    """The training split as tokens, for the configured loss."""
    require_context(config, model)
    return _encoded(config, model, records(config, "train"))


def _encoded(
    config: ConfigDict, model: Pretrained, source: Iterable[data.Record]
) -> data.EncodedSource:
    return encode_of(config)(source, model.tokenizer, seq_len=config.data.seq_len)


def require_context(config: ConfigDict, model: Pretrained) -> None:
    """Raises ValueError for rows that exceed what the model takes."""
    if config.data.seq_len > model.config.context_length:
        raise ValueError(
            f"config.data.seq_len={config.data.seq_len} exceeds the model's context of "
            f"{model.config.context_length} tokens."
        )


def data_identity(
    config: ConfigDict, examples: data.EncodedSource, data_seed: int = 0
) -> dict[str, Any]:
    """What tells the batches of a run from those of another, by name. The examples are known by
    their tokens, which the files, the tokenizer and the chat template make."""
    settings = config.data
    return {
        "data.source": settings.source,
        "data.examples": digest(examples.examples),
        "data.batch_size": settings.batch_size,
        "data.seq_len": settings.seq_len,
        "data.pack": settings.pack,
        "data.seed": settings.seed + data_seed,
    }


def training_batches(
    config: ConfigDict, model: Pretrained, examples: data.EncodedSource, data_seed: int = 0
) -> Any:
    """A fresh endless iterator over the training split; the same config and seed give the same
    batches."""
    settings = config.data
    return data.train_batches(
        examples,
        model.tokenizer,
        batch_size=settings.batch_size,
        seq_len=settings.seq_len,
        seed=settings.seed + data_seed,
        pack=settings.pack,
        place=jax.device_put if config.parallel.mode == "single" else lambda batch: batch,
    )


def validation_batches(
    config: ConfigDict, model: Pretrained, examples: data.EncodedSource | None = None
) -> list[data.Batch]:
    """The first `validation_examples` of the validation split, or of it as `examples`."""
    settings, limit = config.data, config.data.validation_examples
    if examples is None:
        # Records, not examples, are counted: a pair is one, and two judged answers.
        first = itertools.islice(records(config, "validation"), limit)
        examples, limit = _encoded(config, model, first), None
    return data.eval_batches(
        examples,
        model.tokenizer,
        batch_size=settings.batch_size,
        seq_len=settings.seq_len,
        limit=limit,
        pack=settings.pack,
    )


def mean_loss(sums: Sequence[tuple[Any, Any]], unit: str = "token") -> float:
    """The mean of the validation batches' `(total, count)`, where `unit` is what counts.

    Raises:
      ValueError: where nothing counts.
    """
    total, count = np.sum(np.asarray(sums, np.float64), axis=0)
    if not count:
        raise ValueError(
            f"no {unit} of the validation examples counts: they have no answers. Give "
            "config.data examples that have, or raise config.data.validation_examples."
        )
    return float(total / count)


def quiet_logs() -> None:
    """Keeps the chatter of checkpoint and data libraries out of a run's output."""
    for name in ("absl", "orbax", "grain", "jax"):
        logging.getLogger(name).setLevel(logging.ERROR)
