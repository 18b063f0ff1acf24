"""Generation with a cache is generation without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.models import llama
from lora_jax.models.config import LlamaConfig
from lora_jax.models.generate import choose, generate

CONFIG = LlamaConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    context_length=32,
)
PROMPTS = jnp.array([[3, 1, 4, 1, 5], [9, 2, 0, 0, 0]], jnp.int32)
LENGTHS = jnp.array([5, 2], jnp.int32)
NEVER = 49  # an id that these weights do not choose


def adapted():
    params = llama.init(CONFIG, key=jax.random.key(0))
    base, delta = lora.lora_transform(params, lora.LoRA(rank=2), key=jax.random.key(1))
    return lora.bind(base, jax.tree.map(lambda leaf: leaf + 0.05, delta))


def likeliest_after(weights, prompt, answer):
    """What `forward` would have said at each step, given the answer so far."""
    tokens = jnp.concatenate([prompt, answer])[None]
    best = jax.jit(llama.forward, static_argnums=2)(weights, tokens, CONFIG).argmax(-1)
    return best[0, prompt.size - 1 : -1]


def test_greedy_rows_of_different_lengths_are_what_forward_says():
    weights = adapted()
    tokens = generate(weights, PROMPTS, LENGTHS, CONFIG, max_new_tokens=6, eos_id=NEVER)
    for row, length, ours in zip(PROMPTS, LENGTHS.tolist(), tokens, strict=True):
        np.testing.assert_array_equal(ours, likeliest_after(weights, row[:length], ours))


def test_a_row_ends_at_eos():
    weights = adapted()
    free = generate(weights, PROMPTS, LENGTHS, CONFIG, max_new_tokens=6, eos_id=NEVER)
    eos = int(free[0, 2])
    tokens = generate(weights, PROMPTS, LENGTHS, CONFIG, max_new_tokens=6, eos_id=eos)
    first = free[0].tolist().index(eos)
    assert tokens[0].tolist() == free[0, :first].tolist() + [eos] * (6 - first)


def test_sampling_follows_the_distribution():
    logits = jnp.log(jnp.array([[0.6, 0.3, 0.1]]))
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.vmap(lambda key: choose(logits, key, temperature=1.0)[0])(keys)
    np.testing.assert_allclose(np.bincount(draw, minlength=3) / 4000, [0.6, 0.3, 0.1], atol=0.03)
    nucleus = jax.vmap(lambda key: choose(logits, key, temperature=1.0, top_p=0.8)[0])(keys)
    shares = np.bincount(nucleus, minlength=3) / 4000
    np.testing.assert_allclose(shares, [2 / 3, 1 / 3, 0], atol=0.03)


def test_what_cannot_be_generated_is_said():
    weights = adapted()
    with pytest.raises(ValueError, match="exceed the model's context of 32"):
        generate(weights, PROMPTS, LENGTHS, CONFIG, max_new_tokens=28, eos_id=NEVER)
    with pytest.raises(ValueError, match="samples, which needs a key"):
        generate(weights, PROMPTS, LENGTHS, CONFIG, max_new_tokens=2, eos_id=NEVER, temperature=0.5)
