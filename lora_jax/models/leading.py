"""The rows of a prompt and the keys and values of a prefix, which a delta puts before the tokens.

Dimensions: B batch, T positions, P rows or keys in front, S keys, D hidden, K heads, H head size.
"""

import jax
import jax.numpy as jnp

from lora_jax.models.config import DecoderConfig
from lora_jax.models.family import Params
from lora_jax.models.unread_extras import require_read


def leading(params: Params, config: DecoderConfig) -> tuple[int, int]:
    """How many keys of a prefix, and how many rows of a prompt, are in front of the tokens.

    Raises:
      ValueError: if they leave no place in the model's context, or a prefix is of another width
        than the keys; for a prompt or a prefix at a path that is not read.
    """
    require_read(params, config)
    prefix = params["layers"]["attn"].get("prefix")
    prompt = params.get("prompt")
    lengths = (
        0 if prefix is None else prefix.k.shape[-2],
        0 if prompt is None else prompt.rows.shape[-2],
    )
    if sum(lengths) >= config.context_length:
        raise ValueError(
            f"a prefix of {lengths[0]} and a prompt of {lengths[1]} leave no token in the model's "
            f"context of {config.context_length}: make them shorter."
        )
    return lengths


def prompt_rows(params: Params, x_BTD: jax.Array) -> jax.Array:
    """The prompt `[B, P, D]`, in the type of the embedded tokens."""
    rows = params["prompt"].rows.astype(x_BTD.dtype)
    return jnp.broadcast_to(rows, (x_BTD.shape[0], *rows.shape[-2:]))


def prefix_of(weights: Params) -> tuple[jax.Array, jax.Array]:
    return weights["attn"]["prefix"].k, weights["attn"]["prefix"].v


def prefix_heads(leaf: jax.Array, k_BSKH: jax.Array) -> jax.Array:
    """Keys or values of a prefix, `[P, K*H]` or `[B, P, K*H]`, as `[B, P, K, H]`."""
    B, _, K, H = k_BSKH.shape
    heads = leaf.reshape(*leaf.shape[:-1], K, H).astype(k_BSKH.dtype)
    return jnp.broadcast_to(heads, (B, *heads.shape[-3:]))
