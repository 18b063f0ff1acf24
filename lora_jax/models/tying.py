"""A tied output head as a weight of its own."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models.config import DecoderConfig
from lora_jax.weights import is_weight, transpose


def untie(params: Mapping[str, Any], config: DecoderConfig) -> tuple[dict[str, Any], DecoderConfig]:
    """The same model with an output head of its own, `lm_head [D, V]`: a copy of the embedding.

    An adapter can then change one of the two and leave the other. A model that has a head already
    is returned unchanged. The head of a quantised embedding shares its memory.

    Args:
      params: the tree of a decoder, or its shapes.
      config: its shape.

    Returns:
      The params with `lm_head`, and the config with `tie_embeddings=False`.
    """
    if not config.tie_embeddings:
        return dict(params), config
    table = params["embed"]
    if isinstance(table, jax.ShapeDtypeStruct):
        head: Any = jax.ShapeDtypeStruct(table.shape[::-1], table.dtype)
    else:
        head = transpose(table) if is_weight(table) else jnp.swapaxes(table, -1, -2)
    return {**params, "lm_head": head}, dataclasses.replace(config, tie_embeddings=False)
