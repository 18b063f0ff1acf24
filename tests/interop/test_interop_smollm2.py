"""The default model computes what transformers computes from the same file."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import llama
from lora_jax.models.llama import LlamaConfig

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "smollm2_logits.npz")

pytestmark = pytest.mark.network


def test_config(smollm2):
    assert smollm2.config == LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        context_length=8192,
        rope_theta=100_000.0,
        tie_embeddings=True,
    )


def test_logits(smollm2):
    tokens = jnp.asarray(GOLDEN["tokens"])[None]
    logits = np.asarray(llama.forward(smollm2.params, tokens, smollm2.config))[0]
    bound = 1e-4 * GOLDEN["largest"]
    assert np.abs(logits[-1, GOLDEN["top_ids"]] - GOLDEN["top_logits"]).max() <= bound
    here = logits[GOLDEN["positions"]][:, GOLDEN["ids"]]
    assert np.abs(here - GOLDEN["logits"]).max() <= bound


def test_greedy_decoding(smollm2):
    """Every one of the fifty tokens is the likeliest after those before it."""
    prompt, generated = GOLDEN["prompt"], GOLDEN["generated"]
    tokens = jnp.asarray(np.concatenate([prompt, generated]))[None]
    logits = llama.forward(smollm2.params, tokens, smollm2.config)[0]
    likeliest = np.asarray(logits.argmax(-1))[len(prompt) - 1 : -1]
    np.testing.assert_array_equal(likeliest, generated)
