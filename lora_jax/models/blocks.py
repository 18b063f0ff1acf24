"""Parts that layers of several families share.

Dimensions: B batch, T positions, D hidden, F intermediate, N query heads, K key/value heads,
H head size.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.models.config import DecoderConfig
from lora_jax.models.family import Params
from lora_jax.models.mixed_dtypes import product
from lora_jax.models.rope import rotate

Heads = tuple[jax.Array, jax.Array, jax.Array]


def rotated_heads(
    heads: Callable[[str, int], jax.Array], positions_BT: jax.Array, config: DecoderConfig
) -> Heads:
    """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]`, of which the first two are rotated by
    position; `heads(name, count)` returns those of "q", "k" or "v"."""
    q_BTNH = rotate(heads("q", config.num_heads), positions_BT, config)
    k_BTKH = rotate(heads("k", config.num_kv_heads), positions_BT, config)
    v_BTKH = heads("v", config.num_kv_heads)
    return (
        checkpoint_name(q_BTNH, "query"),
        checkpoint_name(k_BTKH, "key"),
        checkpoint_name(v_BTKH, "value"),
    )


def gated_mlp(
    x_BTD: jax.Array, weights: Params, activation: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """`(activation(x @ gate_proj) * (x @ up_proj)) @ down_proj`."""
    gate_BTF = checkpoint_name(product(x_BTD, weights["gate_proj"]), "gate")
    up_BTF = checkpoint_name(product(x_BTD, weights["up_proj"]), "up")
    return product(activation(gate_BTF) * up_BTF, weights["down_proj"])


def normalized(x: jax.Array, eps: float) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps)` over the last axis, float32."""
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)
