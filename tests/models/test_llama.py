"""The Llama against itself: its cache, packing, rematerialisation, and RoPE from its formula."""

import dataclasses
import math

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close

import lora_jax as lora
from lora_jax.kernels.attention import attend
from lora_jax.models import SHAPES, llama
from lora_jax.models.config import Rope, RopeScaling
from lora_jax.models.rope import inverse_frequencies, rotate

SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=16)
VARIANTS = {
    "gqa": {},
    "mha_tied": {"num_kv_heads": 4, "tie_embeddings": True},
    "mqa_scaled": {"num_kv_heads": 1, "rope_scaling": SCALING},
}
STATES = jax.jit(llama.hidden_states, static_argnums=2, static_argnames=("remat", "unroll"))
EXTEND = jax.jit(llama.extend, static_argnums=3)


@pytest.mark.sampled
@pytest.mark.parametrize("chunks", [(1,) * 7, (4, 3)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_reading_on_from_a_cache(variant, chunks):
    config, params, tokens = cases.llama_case(**VARIANTS[variant])
    cache, parts, at = llama.init_cache(config, 2, 9, jnp.float32), [], 0
    for size in chunks:
        part, cache = EXTEND(params, tokens[:, at : at + size], cache, config)
        parts, at = [*parts, part], at + size
    expected = STATES(params, tokens, config)
    assert_close(jnp.concatenate(parts, axis=1), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(cache.lengths, 7)


def test_rows_of_different_lengths_read_on_by_themselves():
    config, params, tokens = cases.llama_case()
    cache = llama.init_cache(config, 2, 9, jnp.float32)
    _, cache = EXTEND(params, tokens[:, :4], cache, config)
    cache = cache.replace(lengths=jnp.array([4, 2]))
    step = jnp.stack([tokens[0, 4:6], tokens[1, 2:4]])
    part, _ = EXTEND(params, step, cache, config)
    expected = STATES(params, tokens, config)
    assert_close(part, jnp.stack([expected[0, 4:6], expected[1, 2:4]]), rtol=1e-4, atol=1e-5)


def test_cache_under_adapters():
    config, params, tokens = cases.llama_case()
    weights = lora.bind(params, cases.llama_delta(params, lora.LoRA(rank=2)))
    part, cache = EXTEND(
        weights, tokens[:, :5], llama.init_cache(config, 2, 7, jnp.float32), config
    )
    rest, _ = EXTEND(weights, tokens[:, 5:], cache, config)
    expected = STATES(weights, tokens, config)
    assert_close(jnp.concatenate([part, rest], axis=1), expected, rtol=1e-4, atol=1e-5)


SEGMENTS = jnp.array([[0, 0, 0, 1, 1, 1, 1]])
POSITIONS = jnp.array([[0, 1, 2, 0, 1, 2, 3]])


def test_a_packed_row_equals_separate_rows():
    config, params, tokens = cases.llama_case()
    packed = STATES(params, tokens[:1], config, positions=POSITIONS, segment_ids=SEGMENTS)
    alone = [STATES(params, tokens[:1, s], config) for s in (slice(3), slice(3, 7))]
    assert_close(packed, jnp.concatenate(alone, axis=1), rtol=1e-4, atol=1e-5)


def test_segments_do_not_leak():
    config, params, tokens = cases.llama_case()

    def total(embedded, row):
        weights = {**params, "embed": embedded}
        states = STATES(weights, row, config, positions=POSITIONS, segment_ids=SEGMENTS)
        return (states[:, 3:] ** 2).sum(), states

    distinct = jnp.arange(7)[None]
    gradient, states = jax.grad(total, has_aux=True)(params["embed"], distinct)
    assert not np.any(gradient[:3]) and np.all(np.any(gradient[3:7], axis=1))
    _, changed = total(params["embed"], distinct.at[:, :3].set(9))
    chex.assert_trees_all_equal(changed[:, 3:], states[:, 3:])
    assert np.abs(changed[:, :3] - states[:, :3]).max() > 1e-2


def test_no_position_sees_ahead():
    config, params, tokens = cases.llama_case()
    states = STATES(params, tokens, config)
    changed = STATES(params, tokens.at[:, 4:].set(1), config)
    chex.assert_trees_all_equal(changed[:, :4], states[:, :4])


def test_positions_count_only_by_their_distance():
    config, params, tokens = cases.llama_case()
    shifted = STATES(params, tokens, config, positions=jnp.broadcast_to(jnp.arange(20, 27), (2, 7)))
    assert_close(shifted, STATES(params, tokens, config), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("remat", ["elementwise", "full", "offload"])
def test_remat_changes_neither_values_nor_gradients(remat):
    config, params, tokens = cases.llama_case()
    delta = cases.llama_delta(params, lora.LoRA(rank=2), targets="qv")

    def loss(delta, remat):
        return (STATES(lora.bind(params, delta), tokens, config, remat=remat) ** 2).sum()

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    ours, theirs = (gradient(delta, name) for name in (remat, "none"))
    assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_unknown_remat():
    config, params, tokens = cases.llama_case()
    with pytest.raises(
        ValueError, match="remat='some': expected one of none, elementwise, full, offload"
    ):
        llama.hidden_states(params, tokens, config, remat="some")


def test_unrolled_layers_are_scanned_layers():
    config, params, tokens = cases.llama_case()
    ours = STATES(params, tokens, config, unroll=config.num_layers)
    assert_close(ours, STATES(params, tokens, config), rtol=1e-4, atol=1e-5)


def test_query_heads_share_a_group_by_neighbours():
    q, k, v = cases.normal(0, 2, 5, 4, 6), cases.normal(1, 2, 5, 2, 6), cases.normal(2, 2, 5, 2, 6)
    repeated = attend(q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2))
    assert_close(attend(q, k, v), repeated, atol=5e-6)


def test_attention_formula():
    q, k, v = (np.asarray(cases.normal(i, 1, 5, 1, 6), np.float64) for i in range(3))
    scores = q[0, :, 0] @ k[0, :, 0].T / math.sqrt(6)
    scores = np.where(np.tril(np.ones((5, 5))), scores, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    ours = attend(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    assert_close(ours[0, :, 0], weights @ v[0, :, 0], rtol=1e-4, atol=1e-5)


def test_a_tied_head_is_the_embedding():
    config, params, tokens = cases.llama_case(tie_embeddings=True)
    assert "lm_head" not in params
    untied = {**params, "lm_head": params["embed"].T}
    assert_close(llama.forward(params, tokens, config),
                 llama.forward(untied, tokens, config), rtol=1e-4, atol=1e-5)  # fmt: skip


def test_init_has_the_documented_tree():
    config = cases.tiny_llama()
    params = jax.eval_shape(lambda: llama.init(config, key=jax.random.key(0), dtype=jnp.bfloat16))
    assert params["layers"]["attn"]["k_proj"].shape == (3, 16, 8)
    assert params["layers"]["mlp"]["down_proj"].shape == (3, 24, 16)
    assert params["embed"].shape == (32, 16) and params["lm_head"].shape == (16, 32)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


@pytest.mark.mixed_dtypes
def test_bf16():
    config, params, tokens = cases.llama_case()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    weights = lora.bind(half, cases.llama_delta(half, lora.LoRA(rank=2), size=0.01))
    logits = llama.forward(weights, tokens, config)
    assert logits.dtype == jnp.bfloat16
    exact = llama.forward(params, tokens, config)
    assert np.abs(np.asarray(logits, np.float32) - exact).max() < 0.1 * np.abs(exact).max()


def test_rope_turns_pairs_by_position_times_frequency():
    frequencies = inverse_frequencies(Rope(theta=10_000.0, dims=6))
    x = np.asarray(cases.normal(0, 1, 4, 1, 6))
    turned = np.asarray(rotate(jnp.asarray(x), jnp.arange(4)[None], frequencies))
    for t in range(4):
        for i in range(3):
            turn = np.exp(1j * t * 10_000.0 ** (-2 * i / 6))
            pair = (x[0, t, 0, i] + 1j * x[0, t, 0, i + 3]) * turn
            assert np.isclose(turned[0, t, 0, i] + 1j * turned[0, t, 0, i + 3], pair, atol=1e-5)


def test_rope_scaling_formula():
    """Llama 3.1's three bands, frequency by frequency."""
    rope = Rope(theta=500_000.0, dims=128, scaling=RopeScaling(factor=8.0))
    plain = inverse_frequencies(dataclasses.replace(rope, scaling=None))
    bands = set()
    for found, frequency in zip(inverse_frequencies(rope), plain, strict=True):
        turns = 8192 * frequency / (2 * math.pi)
        if turns > 4:
            band, expected = "kept", frequency
        elif turns < 1:
            band, expected = "stretched", frequency / 8
        else:
            blend = (turns - 1) / 3
            band, expected = "blended", (1 - blend) * frequency / 8 + blend * frequency
        bands.add(band)
        assert np.isclose(found, expected, rtol=1e-5)
    assert bands == {"kept", "stretched", "blended"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
     ({"head_dim": 5}, "head_dim=5 must be even")],
)  # fmt: skip
def test_impossible_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        cases.tiny_llama(**changes)


@pytest.mark.parametrize("extras", [{"q_bias", "k_bias", "v_bias"}, {"q_norm", "k_norm"}])
def test_biases_and_head_norms_are_no_targets(extras):
    config = dataclasses.replace(
        SHAPES["tiny"], qkv_bias="q_bias" in extras, qk_norm="q_norm" in extras
    )
    key = jax.random.key(0)
    params = jax.eval_shape(lambda: llama.init(config, key=key))
    projections = {f"{name}_proj" for name in "qkvo"}
    assert set(params["layers"]["attn"]) == projections | extras
    _, delta = jax.eval_shape(lambda p: lora.lora_transform(p, lora.LoRA(), key=key), params)
    assert set(delta["layers"]["attn"]) == projections
    assert set(delta["layers"]["mlp"]) == {"gate_proj", "up_proj", "down_proj"}
    assert set(delta) == {"layers"} and set(delta["layers"]) == {"attn", "mlp"}
