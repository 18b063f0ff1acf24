"""Parts that layers of all Gemmas share.

Dimensions: B batch, T positions, D hidden, V vocabulary, N query heads, H head size.

Source: Gemma 2 (arXiv:2408.00118, section 2), and transformers 5.24 for the order of roundings.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.models.blocks import attention_output, gated_mlp, normalized
from lora_jax.models.config import DecoderConfig
from lora_jax.models.family import Params, plain_embed, plain_read_out


def scaled_embed(tokens_BT: jax.Array, table: Any, config: DecoderConfig) -> jax.Array:
    """`sqrt(D) * table[tokens]`."""
    x_BTD = plain_embed(tokens_BT, table, config)
    return x_BTD * jnp.asarray(math.sqrt(config.hidden_size), x_BTD.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, config: DecoderConfig) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * (1 + scale)` over the last axis, in float32, cast last."""
    normed = normalized(x, config.norm_eps)
    return (normed * jnp.broadcast_to(1 + scale.astype(jnp.float32), x.shape)).astype(x.dtype)


def finish(
    x_BTD: jax.Array, attended_BTNH: jax.Array, weights: Params, config: DecoderConfig
) -> jax.Array:
    """The rest of a layer: output projection and gated MLP, each normed before it is added."""
    y_BTD = attention_output(attended_BTNH, weights["attn"])
    x_BTD = checkpoint_name(x_BTD + rms_norm(y_BTD, weights["attn_post_norm"], config), "residual")
    y_BTD = rms_norm(x_BTD, weights["mlp_norm"], config)
    y_BTD = gated_mlp(y_BTD, weights["mlp"], jax.nn.gelu)  # the tanh approximation
    return x_BTD + rms_norm(y_BTD, weights["mlp_post_norm"], config)


def capped_read_out(x_BTD: jax.Array, head: Any, config: Any) -> jax.Array:
    """`cap * tanh(x @ head / cap)`, where the config has a `logit_cap`."""
    logits_BTV = plain_read_out(x_BTD, head, config)
    cap = config.logit_cap
    return logits_BTV if cap is None else jnp.tanh(logits_BTV / cap) * cap
