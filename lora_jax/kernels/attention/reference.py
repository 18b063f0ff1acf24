"""What attention is: a mask and a softmax, with a score for every query and key.

Dimensions: B batch, T query positions, S key positions, N query heads, K key/value heads, H head.
"""

import jax
import jax.numpy as jnp


def causal_mask(
    length: int, segment_ids_BT: jax.Array | None, *, prompt: int = 0, prefix: int = 0
) -> jax.Array:
    """`[B or 1, 1, P + T, S]`, True where a query may look: not ahead, nor into another segment.

    The keys are `prefix` ones that no query stands for, the P rows of a `prompt`, and T = `length`
    positions, so that S = prefix + P + T. All segments see the first two.
    """
    mask = jnp.tril(jnp.ones((prompt + length, prompt + length), bool))[None, None]
    if segment_ids_BT is not None:
        same = segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]
        before = (prompt, 0)
        mask = mask & jnp.pad(same, ((0, 0), (0, 0), before, before), constant_values=True)
    return jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (prefix, 0)), constant_values=True)


def masked_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: jax.Array
) -> jax.Array:
    """Attention `[B, T, N, H]`, scores scaled by `1 / sqrt(H)`; `mask [B or 1, 1, T, S]`."""
    with jax.numpy_dtype_promotion("standard"):  # JAX scales 16-bit scores in float32
        return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask)
