"""Greedy and sampled generation with a KV cache."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models import llama
from lora_jax.models.config import LlamaConfig
from lora_jax.models.mixed_dtypes import read_out


def generate(
    params: llama.Params,
    prompts: jax.Array,
    lengths: jax.Array,
    config: LlamaConfig,
    *,
    max_new_tokens: int,
    eos_id: int,
    key: jax.Array | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> jax.Array:
    """Continues each prompt until `eos_id` or `max_new_tokens`. Jit it with the static arguments.

    Args:
      params: the model's weights, of any type.
      prompts: `[B, T]` int32, each row padded on the right with anything.
      lengths: `[B]` int32, how many tokens of each row count, at least 1.
      config: the shape of the model.
      max_new_tokens: how many tokens to return.
      eos_id: ends a row, and fills it up from there.
      key: a typed key, needed when `temperature` is above 0.
      temperature: 0 takes the most likely token; else logits are divided by it and sampled.
      top_p: samples from the smallest set of tokens whose probabilities sum to at least this
        (Holtzman et al. 2020, arXiv:1904.09751).

    Returns:
      The new tokens, `[B, max_new_tokens]`.

    Raises:
      ValueError: if prompt and answer exceed the model's context, or sampling lacks a key.
    """
    batch, width = prompts.shape
    before = sum(llama.leading(params, config))
    if before + width + max_new_tokens > config.context_length:
        taken = f", of which a prefix or soft prompt takes {before}" if before else ""
        raise ValueError(
            f"a prompt of {width} tokens and {max_new_tokens} new ones exceed the model's context "
            f"of {config.context_length}{taken}."
        )
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} samples, which needs a key.")
    keys = jax.random.split(jax.random.key(0) if key is None else key, max_new_tokens)
    head = llama.output_head(params)

    def pick(hidden_BD: jax.Array, key: jax.Array) -> jax.Array:
        logits_BV = read_out(hidden_BD, head).astype(jnp.float32)
        return choose(logits_BV, key, temperature=temperature, top_p=top_p)

    cache = llama.start_cache(params, config, batch, width + max_new_tokens)
    last_B, lengths = lengths - 1, cache.lengths + lengths
    hidden_BTD, cache = llama.extend(params, prompts, cache, config)
    last_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    # What padding wrote behind a row's end lies ahead of its positions until it is overwritten.
    cache = dataclasses.replace(cache, lengths=lengths)

    def step(carry: Any, key: jax.Array):
        cache, hidden_BD, done_B = carry
        token_B = jnp.where(done_B, eos_id, pick(hidden_BD, key))
        hidden_BTD, cache = llama.extend(params, token_B[:, None], cache, config)
        return (cache, hidden_BTD[:, 0], done_B | (token_B == eos_id)), token_B

    start = (cache, last_BD, jnp.zeros(batch, bool))
    _, tokens = jax.lax.scan(step, start, keys)
    return tokens.T


def choose(
    logits: jax.Array, key: jax.Array, *, temperature: float = 0.0, top_p: float = 1.0
) -> jax.Array:
    """A token for each row of `logits [B, V]`; greedy at temperature 0."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.sum(before < top_p, axis=-1, keepdims=True)
        threshold = jnp.take_along_axis(descending, kept - 1, axis=-1)
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
