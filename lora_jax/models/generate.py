"""Greedy and sampled generation with a KV cache."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models.choosing import NONE as NONE
from lora_jax.models.choosing import check_sampling as check_sampling
from lora_jax.models.choosing import choose as choose
from lora_jax.models.choosing import nucleus as nucleus
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import extend, output_head, start_cache
from lora_jax.models.family import Params
from lora_jax.models.leading import leading
from lora_jax.paths import is_known, one_key


def generate(
    params: Params,
    prompts: jax.Array,
    lengths: jax.Array,
    config: DecoderConfig,
    *,
    max_new_tokens: int,
    eos_id: int,
    key: jax.Array | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> jax.Array:
    """Continues each prompt until `eos_id` or `max_new_tokens`. Jit it with the static arguments.

    Each row is continued as if it were alone, whatever stands in its padding.

    Args:
      params: the model's weights, of any type.
      prompts: `[B, T]` int32, each row padded on the right with anything.
      lengths: `[B]` int32, how many tokens of each row count, at least 1.
      config: the shape of the model.
      max_new_tokens: how many tokens to return.
      eos_id: ends a row, and fills it up from there.
      key: a key, needed when `temperature` is above 0.
      temperature: 0 takes the most likely token; else logits are divided by it and sampled.
      top_p: samples from the smallest set of tokens whose probabilities sum to at least this
        (Holtzman et al. 2020, arXiv:1904.09751). 0 takes the most likely token.

    Returns:
      The new tokens, `[B, max_new_tokens]`. A row is -1 from where there is no token to choose:
      the model's logits are NaN, or, under a transformation, its length or a token is impossible.

    Raises:
      ValueError: if prompt and answer exceed the model's context; for a length or a token that is
        out of range, an invalid temperature or top_p, or sampling without a key.
    """

    def pick(hidden_BD: jax.Array, key: jax.Array):
        return _pick(params, hidden_BD, key, config, temperature, top_p), ()

    tokens, _ = _continued(
        params,
        prompts,
        lengths,
        config,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        key=key,
        temperature=temperature,
        top_p=top_p,
        pick=pick,
    )
    return tokens


def sample(
    params: Params,
    prompts: jax.Array,
    lengths: jax.Array,
    config: DecoderConfig,
    *,
    max_new_tokens: int,
    eos_id: int,
    key: jax.Array,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Sampled tokens, as `generate` returns them, and the log-probability that each was sampled
    with, `[B, max_new_tokens]` float32: of logits divided by the temperature. Behind a row's end,
    and where there is no token, it means nothing.

    Arguments and errors are those of `generate`; a temperature of 0 samples nothing and is refused.
    """
    if temperature == 0:
        raise ValueError("temperature=0 takes the likeliest token: there is nothing to sample.")

    def pick(hidden_BD: jax.Array, key: jax.Array):
        logits_BV = config.family.read_out(hidden_BD, output_head(params), config)
        token_B = choose(logits_BV, key, temperature=temperature)
        log_probs_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32) / temperature)
        taken_B1 = jnp.maximum(token_B, 0)[:, None]
        return token_B, jnp.take_along_axis(log_probs_BV, taken_B1, axis=-1)[:, 0]

    return _continued(
        params,
        prompts,
        lengths,
        config,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        key=key,
        temperature=temperature,
        top_p=1.0,
        pick=pick,
    )


def _continued(
    params, prompts, lengths, config, *, max_new_tokens, eos_id, key, temperature, top_p, pick
):
    """The new tokens `[B, N]`, and what `pick`, `(hidden [B, D], key) -> (tokens [B], more [B])`,
    returned beside each."""
    check_sampling(temperature, top_p)
    keys, prompts, possible_B = _checked(
        params, prompts, lengths, config, max_new_tokens, key, temperature
    )
    batch, width = prompts.shape
    last_BD, cache = _read_prompts(params, prompts, lengths, config, width + max_new_tokens)

    def step(carry: Any, key: jax.Array):
        cache, hidden_BD, done_B, token_B = carry
        picked_B, more = pick(hidden_BD, key)
        token_B = jnp.where(done_B, token_B, picked_B)
        hidden_BTD, cache = extend(params, token_B[:, None], cache, config)
        done_B = done_B | (token_B == eos_id) | (token_B == NONE)
        return (cache, hidden_BTD[:, 0], done_B, token_B), (token_B, more)

    start = (cache, last_BD, ~possible_B, jnp.full(batch, NONE, jnp.int32))
    _, (tokens, more) = jax.lax.scan(step, start, keys)
    return jax.tree.map(jnp.transpose, (tokens, more))


def stream(
    params: Params,
    prompts: jax.Array,
    lengths: jax.Array,
    config: DecoderConfig,
    *,
    max_new_tokens: int,
    eos_id: int,
    key: jax.Array | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Iterator[np.ndarray]:
    """What `generate` returns, column by column as it is made: `[B]` for each new token, until
    every row has ended. Compiles by itself; arguments and errors are those of `generate`."""
    check_sampling(temperature, top_p)
    keys, prompts, possible_B = _checked(
        params, prompts, lengths, config, max_new_tokens, key, temperature
    )
    room = prompts.shape[1] + max_new_tokens
    how = {"config": config, "temperature": temperature, "top_p": top_p}
    token_B, cache = _first_token(params, prompts, jnp.asarray(lengths), keys[0], room=room, **how)
    token = np.where(possible_B, token_B, NONE)
    for i in range(max_new_tokens):
        yield token
        done = (token == eos_id) | (token == NONE)
        if done.all() or i + 1 == max_new_tokens:
            return
        token_B, cache = _next_token(params, jnp.asarray(token), cache, keys[i + 1], **how)
        token = np.where(done, token, token_B)


_STATIC = ("config", "room", "temperature", "top_p")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _first_token(params, prompts, lengths, key, *, config, room, temperature, top_p):
    last_BD, cache = _read_prompts(params, prompts, lengths, config, room)
    return _pick(params, last_BD, key, config, temperature, top_p), cache


@functools.partial(jax.jit, static_argnames=_STATIC[:1] + _STATIC[2:], donate_argnames="cache")
def _next_token(params, token_B, cache, key, *, config, temperature, top_p):
    hidden_BTD, cache = extend(params, token_B[:, None], cache, config)
    return _pick(params, hidden_BTD[:, 0], key, config, temperature, top_p), cache


def _pick(params, hidden_BD, key, config, temperature, top_p) -> jax.Array:
    logits_BV = config.family.read_out(hidden_BD, output_head(params), config)
    return choose(logits_BV, key, temperature=temperature, top_p=top_p)


def _read_prompts(params, prompts, lengths, config, room):
    """What the head reads behind each row's last token, and a cache with room for `room`."""
    cache = start_cache(params, config, prompts.shape[0], room)
    last_B, lengths = lengths - 1, cache.lengths + lengths
    hidden_BTD, cache = extend(params, prompts, cache, config)
    last_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    # Padding wrote after a row's end: ahead of its positions, where it is overwritten before it is
    # read.
    return last_BD, dataclasses.replace(cache, lengths=lengths)


def _checked(
    params: Params,
    prompts: Any,
    lengths: Any,
    config: DecoderConfig,
    max_new_tokens: int,
    key: Any,
    temperature: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A key for each new token, and what `_counted` returns. Raises ValueError as `generate`."""
    _, width = _checked_shape(prompts, lengths, max_new_tokens)
    before = sum(leading(params, config))
    if before + width + max_new_tokens > config.context_length:
        taken = f", of which a prefix or soft prompt takes {before}" if before else ""
        raise ValueError(
            f"a prompt of {width} tokens and {max_new_tokens} new ones exceed the model's context "
            f"of {config.context_length}{taken}."
        )
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} samples, which needs a key.")
    keys = jax.random.split(jax.random.key(0) if key is None else one_key(key), max_new_tokens)
    return keys, *_counted(prompts, lengths, config.vocab_size)


def _checked_shape(prompts: Any, lengths: Any, max_new_tokens: int) -> tuple[int, int]:
    if prompts.ndim != 2 or tuple(lengths.shape) != prompts.shape[:1]:
        raise ValueError(
            f"prompts have the shape {tuple(prompts.shape)} and lengths {tuple(lengths.shape)}: "
            "expected [batch, width] and [batch]."
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: expected at least 1.")
    return prompts.shape


def _counted(prompts: Any, lengths: Any, vocab: int) -> tuple[jax.Array, jax.Array]:
    """The prompts with tokens of no meaning in their padding, and which rows are possible.

    Raises:
      ValueError: for a row that is not, where the numbers are known.
    """
    width = prompts.shape[1]
    numbers: Any = np if is_known(prompts) and is_known(lengths) else jnp
    tokens, counts = numbers.asarray(prompts), numbers.asarray(lengths)
    counted = numbers.arange(width)[None] < counts[:, None]
    fits = (counts >= 1) & (counts <= width)
    known = ~counted | ((tokens >= 0) & (tokens < vocab))
    if numbers is np and not fits.all():
        row = int(np.argmin(fits))
        raise ValueError(f"row {row} counts {counts[row]} tokens: expected 1 to {width}, the width "
                         "of the prompts.")  # fmt: skip
    if numbers is np and not known.all():
        row, place = np.argwhere(~known)[0]
        raise ValueError(
            f"row {row} holds the token {tokens[row, place]} at position {place}: the model's "
            f"vocabulary has {vocab}, from 0. Is it the tokenizer of this model?"
        )
    tokens = numbers.where(counted, tokens, numbers.zeros_like(tokens))
    return jnp.asarray(tokens), jnp.asarray(fits & known.all(axis=1))
