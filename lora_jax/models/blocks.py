"""Parts that layers of several families share. A bias counts where the layer has one.

Dimensions: B batch, T positions, D hidden, F intermediate, N query heads, K key/value heads,
H head size.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.models.config import DecoderConfig
from lora_jax.models.family import Params
from lora_jax.models.mixed_dtypes import along, product

Heads = tuple[jax.Array, jax.Array, jax.Array]
Norm = Callable[[jax.Array, jax.Array, Any], jax.Array]


def projected(x: jax.Array, weights: Params, name: str) -> jax.Array:
    """`x @ {name}_proj + {name}_bias`."""
    y = product(x, weights[f"{name}_proj"])
    bias = weights.get(f"{name}_bias")
    return y if bias is None else along(jnp.add, y, bias)


def split_heads(y_BTE: jax.Array, count: int) -> jax.Array:
    """`[B, T, count * H]` as `[B, T, count, H]`."""
    return y_BTE.reshape(*y_BTE.shape[:2], count, -1)


def attention_heads(
    x_BTD: jax.Array, attn: Params, config: DecoderConfig, norm: Norm | None = None
) -> Heads:
    """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]`; a `norm` is that of each head of the
    first two."""
    q_BTNH = split_heads(projected(x_BTD, attn, "q"), config.num_heads)
    k_BTKH = split_heads(projected(x_BTD, attn, "k"), config.num_kv_heads)
    v_BTKH = split_heads(projected(x_BTD, attn, "v"), config.num_kv_heads)
    if norm is not None:
        q_BTNH = norm(checkpoint_name(q_BTNH, "projected"), attn["q_norm"], config)
        k_BTKH = norm(checkpoint_name(k_BTKH, "projected"), attn["k_norm"], config)
    return q_BTNH, k_BTKH, v_BTKH


def attention_output(attended_BTNH: jax.Array, attn: Params) -> jax.Array:
    """The heads side by side through the output projection, `[B, T, D]`."""
    B, T = attended_BTNH.shape[:2]
    return projected(attended_BTNH.reshape(B, T, -1), attn, "o")


def gated_mlp(
    x_BTD: jax.Array, mlp: Params, activation: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """`(activation(x @ gate_proj) * (x @ up_proj)) @ down_proj`."""
    gate_BTF = checkpoint_name(projected(x_BTD, mlp, "gate"), "gate")
    up_BTF = checkpoint_name(projected(x_BTD, mlp, "up"), "up")
    return projected(activation(gate_BTF) * up_BTF, mlp, "down")


def normalized(x: jax.Array, eps: float) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps)` over the last axis, float32."""
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)


def rms_norm(x: jax.Array, scale: jax.Array, config: DecoderConfig) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32, in the dtype of `x`."""
    return along(jnp.multiply, normalized(x, config.norm_eps).astype(x.dtype), scale)


def finish(
    x_BTD: jax.Array, attended_BTNH: jax.Array, weights: Params, config: DecoderConfig
) -> jax.Array:
    """A Llama's layer after attention: the output projection, then the gated MLP of the norm."""
    x_BTD = x_BTD + attention_output(attended_BTNH, weights["attn"])
    x_BTD = checkpoint_name(x_BTD, "residual")
    y_BTD = rms_norm(x_BTD, weights["mlp_norm"], config)
    return x_BTD + gated_mlp(y_BTD, weights["mlp"], jax.nn.silu)
