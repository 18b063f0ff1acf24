"""A token for each row of logits, by the row's own settings and seed.

Dimensions: R rows, V vocabulary.
"""

import flax.struct
import jax
import jax.numpy as jnp

from lora_jax.models.generate import NONE
from lora_jax.serving.request import MOST_LOGPROBS


@flax.struct.dataclass
class RowSampling:
    """How each row's token is chosen.

    Attributes:
      temperature, top_p: `[R]` float32.
      top_k: `[R]` int32, 0 for all.
      seed: `[R, 2]` uint32, the high and the low half.
      step: `[R]` int32, which token of its answer a row chooses.
      logprobs: `[R]` bool, whether a row needs log-probabilities.
    """

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    seed: jax.Array
    step: jax.Array
    logprobs: jax.Array


@flax.struct.dataclass
class Chosen:
    """Attributes:
    token: `[R]` int32, -1 where the logits are not numbers.
    logprob: `[R]`, of the token under the model alone.
    top_token, top_logprob: `[R, M]`, the likeliest ones.
    """

    token: jax.Array
    logprob: jax.Array
    top_token: jax.Array
    top_logprob: jax.Array


def choose_each(logits_RV: jax.Array, how: RowSampling) -> Chosen:
    """As `models.generate.choose`, with settings for each row.

    Noise, sorting and log-probabilities are computed only in batches where a row needs them; the
    token of a row does not depend on the others.
    """
    logits_RV = logits_RV.astype(jnp.float32)
    largest_R = jnp.max(logits_RV, axis=-1)
    is_greedy = (how.temperature == 0) | (how.top_p == 0) | (how.top_k == 1)
    likeliest_R = jnp.argmax(logits_RV, axis=-1).astype(jnp.int32)
    token_R = jax.lax.cond(
        jnp.all(is_greedy),
        lambda: likeliest_R,
        lambda: jnp.where(is_greedy, likeliest_R, _sample(logits_RV, largest_R, how)),
    )
    known_R = jnp.where(is_greedy, largest_R > -jnp.inf, jnp.isfinite(largest_R))
    token_R = jnp.where(known_R, token_R, NONE)
    return Chosen(token_R, *_logprobs(logits_RV, token_R, jnp.any(how.logprobs)))


def _sample(logits_RV: jax.Array, largest_R: jax.Array, how: RowSampling) -> jax.Array:
    smallest = jnp.finfo(jnp.float32).tiny
    scaled_RV = (logits_RV - largest_R[:, None]) / jnp.maximum(how.temperature, smallest)[:, None]
    noise_RV = jax.vmap(_gumbel, in_axes=(0, 0, None))(how.seed, how.step, logits_RV.shape[1])
    is_restricted = (how.top_p < 1) | (how.top_k > 0)
    return jax.lax.cond(
        jnp.any(is_restricted),
        lambda: _restricted(scaled_RV, noise_RV, how),
        lambda: jnp.argmax(scaled_RV + noise_RV, axis=-1).astype(jnp.int32),
    )


def _gumbel(seed: jax.Array, step: jax.Array, size: int) -> jax.Array:
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return jax.random.gumbel(jax.random.fold_in(key, step), (size,), jnp.float32)


def _restricted(scaled_RV: jax.Array, noise_RV: jax.Array, how: RowSampling) -> jax.Array:
    """The largest sum with its noise: of the `top_k` likeliest, among the fewest whose shares of
    these sum to `top_p`. Of equal ones, those with the lowest ids are kept."""
    order_RV = jnp.argsort(scaled_RV, axis=-1, descending=True, stable=True)
    sorted_RV = jnp.take_along_axis(scaled_RV, order_RV, axis=-1)
    rank_V = jnp.arange(scaled_RV.shape[1])[None]
    largest_k = jnp.where(how.top_k > 0, how.top_k, scaled_RV.shape[1])[:, None]
    sorted_RV = jnp.where(rank_V < largest_k, sorted_RV, -jnp.inf)
    total_RV = jnp.cumsum(jax.nn.softmax(sorted_RV, axis=-1), axis=-1)
    before_RV = jnp.pad(total_RV[:, :-1], [(0, 0), (1, 0)])
    # Sums of many probabilities may pass 1 by a rounding.
    kept_RV = (rank_V == 0) | (before_RV < how.top_p[:, None]) | (how.top_p >= 1)[:, None]
    noise_RV = jnp.take_along_axis(noise_RV, order_RV, axis=-1)
    best_R = jnp.argmax(jnp.where(kept_RV, sorted_RV + noise_RV, -jnp.inf), axis=-1)
    return jnp.take_along_axis(order_RV, best_R[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _logprobs(logits_RV: jax.Array, token_R: jax.Array, any_needed: jax.Array):
    rows, vocab = logits_RV.shape
    most = min(MOST_LOGPROBS, vocab)

    def compute():
        logprobs_RV = jax.nn.log_softmax(logits_RV, axis=-1)
        picked_R1 = jnp.take_along_axis(logprobs_RV, jnp.maximum(token_R, 0)[:, None], axis=-1)
        top_RM, ids_RM = jax.lax.top_k(logprobs_RV, most)
        return picked_R1[:, 0], ids_RM.astype(jnp.int32), top_RM

    def skip():
        return (
            jnp.zeros(rows, jnp.float32),
            jnp.zeros((rows, most), jnp.int32),
            jnp.zeros((rows, most), jnp.float32),
        )

    return jax.lax.cond(any_needed, compute, skip)
