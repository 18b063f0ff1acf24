"""A token from logits: the likeliest, or sampled from all of them or from a nucleus."""

import math

import jax
import jax.numpy as jnp

from lora_jax.paths import one_key

NONE = -1  # stands where a token should, and there is none


def choose(
    logits: jax.Array, key: jax.Array | None, *, temperature: float = 0.0, top_p: float = 1.0
) -> jax.Array:
    """A token for each row of `logits [B, V]`; the likeliest at temperature 0 or `top_p` 0. A row
    has none, and gets -1, where a logit is NaN, or all are -inf; sampled, also where one is inf.

    Raises:
      ValueError: for a temperature below 0, a `top_p` outside [0, 1], or a key that is none.
    """
    check_sampling(temperature, top_p)
    logits = logits.astype(jnp.float32)
    largest = jnp.max(logits, axis=-1)
    if temperature == 0 or top_p == 0:
        return jnp.where(largest > -jnp.inf, jnp.argmax(logits, axis=-1), NONE).astype(jnp.int32)
    # The largest becomes 0 first, which no temperature, however small, takes to infinity.
    smallest = float(jnp.finfo(jnp.float32).tiny)
    logits = (logits - largest[..., None]) / max(temperature, smallest)
    if top_p < 1:
        logits = nucleus(logits, top_p)
    drawn = jax.random.categorical(one_key(key), logits, axis=-1)
    return jnp.where(jnp.isfinite(largest), drawn, NONE).astype(jnp.int32)


def nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """`logits [..., V]` with -inf outside the smallest set of tokens whose probabilities sum to at
    least `top_p`: never empty, and of equal ones at its border those with the lowest ids."""
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    total = jnp.cumsum(probabilities, axis=-1)
    before = jnp.pad(total[..., :-1], [(0, 0)] * (logits.ndim - 1) + [(1, 0)])
    kept = (before < top_p).at[..., 0].set(True)
    kept = jnp.put_along_axis(jnp.zeros_like(kept), order, kept, axis=-1, inplace=False)
    return jnp.where(kept, logits, -jnp.inf)


def check_sampling(temperature: float, top_p: float) -> None:
    """Raises ValueError for what cannot be sampled with."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(
            f"temperature={temperature}: expected a finite number of at least 0, which takes the "
            "most likely token."
        )
    if not 0 <= top_p <= 1:
        raise ValueError(
            f"top_p={top_p}: expected a probability from 0, the most likely token alone, to 1, all "
            "of them."
        )
