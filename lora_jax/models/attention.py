"""Causal grouped-query attention within segments, for whole sequences and for a KV cache.

Dimensions: B batch, T query positions, S key positions, N query heads, K key/value heads, H head.
"""

import jax
import jax.numpy as jnp


def causal_mask(positions_BT: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """`[B, 1, T, T]`, True where a query may look: not ahead, nor into another segment."""
    length = positions_BT.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
    if segment_ids_BT is None:
        return mask
    return mask & (segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :])


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention `[B, T, N, H]`, scores scaled by `1 / sqrt(H)`; `mask [B or 1, 1, T, S]`."""
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask)
