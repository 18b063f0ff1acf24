"""The definition of attention: a mask and a softmax, with a score for every query and key.

Dimensions: B batch, T query positions, S key positions, N query heads, K key/value heads, H head.
"""

import jax
import jax.numpy as jnp


def causal_mask(
    length: int,
    segment_ids_BT: jax.Array | None,
    *,
    prompt: int = 0,
    prefix: int = 0,
    window: jax.Array | int | None = None,
) -> jax.Array:
    """`[B or 1, 1, P + T, S]`, True where a query may see a key: not ahead, nor in another segment,
    nor `window` keys or more behind it.

    The keys are `prefix` ones without a query, the P rows of a `prompt`, and T = `length`
    positions, so that S = prefix + P + T. All segments see the first two.
    """
    mask = jnp.tril(jnp.ones((prompt + length, prompt + length), bool))[None, None]
    if segment_ids_BT is not None:
        same = segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]
        before = (prompt, 0)
        mask = mask & jnp.pad(same, ((0, 0), (0, 0), before, before), constant_values=True)
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (prefix, 0)), constant_values=True)
    if window is None:
        return mask
    queries = prefix + jnp.arange(prompt + length)[None, None]
    return mask & _within(queries, mask.shape[-1], window)


def cached_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    positions_BT: jax.Array,
    *,
    scale: float | None = None,
    cap: float | None = None,
    window: jax.Array | int | None = None,
) -> jax.Array:
    """Attention of queries at `positions` over a cache of S keys, of any float dtype; slots
    ahead of a query's position are not filled yet."""
    slots = jnp.arange(k_BSKH.shape[1])
    mask = slots[None, None, :] <= positions_BT[:, :, None]
    if window is not None:
        mask = mask & _within(positions_BT, k_BSKH.shape[1], window)
    keys, values = k_BSKH.astype(q_BTNH.dtype), v_BSKH.astype(q_BTNH.dtype)
    return masked_attention(q_BTNH, keys, values, mask[:, None], scale=scale, cap=cap)


def _within(queries: jax.Array, keys: int, window: jax.Array | int) -> jax.Array:
    """`[..., T, S]`, whether each key is less than `window` behind each of `queries [..., T]`."""
    key = jax.lax.broadcasted_iota(queries.dtype, (*queries.shape, keys), queries.ndim)
    return queries[..., None] - key < window


def masked_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Attention `[B, T, N, H]` of scores s times `scale`, `1 / sqrt(H)` unless given, then
    `cap * tanh(s / cap)`; `mask [B or 1, 1, T, S]`."""
    with jax.numpy_dtype_promotion("standard"):  # JAX scales 16-bit scores in float32
        if cap is None:
            return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask, scale=scale)
        return _capped(q_BTNH, k_BSKH, v_BSKH, mask, scale or q_BTNH.shape[-1] ** -0.5, cap)


def _capped(q_BTNH, k_BSKH, v_BSKH, mask, scale: float, cap: float) -> jax.Array:
    """As `jax.nn.dot_product_attention`, which has no cap: scores and their softmax in float32."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    scores_BKGTS = cap * jnp.tanh(scores_BKGTS * (scale / cap))
    lowest = jnp.finfo(jnp.float32).min
    shares_BKGTS = jax.nn.softmax(jnp.where(mask[:, :, None], scores_BKGTS, lowest), axis=-1)
    attended = jnp.einsum("BKGTS,BSKH->BTKGH", shares_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    return attended.reshape(B, T, N, H)
