"""RoPE's scalings, frequency by frequency, and the length that they follow."""

import cases
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models.config import Rope
from lora_jax.models.rope import example_lengths, inverse_frequencies, layer_ropes, rotate
from lora_jax.models.rope_scaling import (
    DynamicScaling,
    LinearScaling,
    LongRopeScaling,
    YarnScaling,
    yarn_amplitude,
)

THETA, DIMS = 10_000.0, 16
PLAIN = inverse_frequencies(Rope(theta=THETA, dims=DIMS))
LONGROPE = LongRopeScaling(
    short_factor=(1.0,) * 8, long_factor=(2.0,) * 8, original_context=16, attention_factor=1.5
)


def frequencies(scaling, length=1):
    return np.asarray(inverse_frequencies(Rope(theta=THETA, dims=DIMS, scaling=scaling), length))


def test_linear():
    np.testing.assert_allclose(frequencies(LinearScaling(factor=4.0)), PLAIN / 4, rtol=1e-6)


def test_dynamic_grows_the_base_beyond_the_original_context():
    scaling = DynamicScaling(factor=2.0, original_context=16)
    np.testing.assert_allclose(frequencies(scaling, 16), PLAIN, rtol=1e-6)
    base = THETA * (2 * 40 / 16 - 1) ** (DIMS / (DIMS - 2))
    expected = base ** (-np.arange(0, DIMS, 2) / DIMS)
    np.testing.assert_allclose(frequencies(scaling, 40), expected, rtol=1e-5)
    lengths = frequencies(scaling, jnp.array([[3, 40]]))
    assert lengths.shape == (1, 2, 1, DIMS // 2)
    np.testing.assert_allclose(lengths[0, :, 0], [PLAIN, expected], rtol=1e-5)


def test_yarn_keeps_what_turns_often_and_divides_what_turns_seldom():
    scaling = YarnScaling(factor=4.0, original_context=1024, attention_factor=yarn_amplitude(4.0))
    ratio, turns = frequencies(scaling) / PLAIN, 1024 * PLAIN / (2 * np.pi)
    assert np.allclose(ratio[turns > 100], 1) and np.allclose(ratio[turns < 0.2], 0.25)
    between = ratio[(turns < 32) & (turns > 1)]
    assert len(between) and np.all((between > 0.25) & (between < 1))
    assert scaling.amplitude == pytest.approx(0.1 * np.log(4) + 1)


def test_longrope_chooses_by_length():
    np.testing.assert_allclose(frequencies(LONGROPE, 16), PLAIN, rtol=1e-6)
    np.testing.assert_allclose(frequencies(LONGROPE, 17), PLAIN / 2, rtol=1e-6)
    lengths = frequencies(LONGROPE, jnp.array([[16, 17]]))
    np.testing.assert_allclose(lengths[0, :, 0], [PLAIN, PLAIN / 2], rtol=1e-6)


def test_a_packed_example_follows_its_own_length():
    """And without one that follows lengths, all rows share the row's."""
    config = cases.tiny_llama(head_dim=DIMS, rope_scaling=LONGROPE)
    positions = jnp.array([[0, 1, 2, 0, 1, 0]])
    segments = jnp.array([[1, 1, 1, 2, 2, 0]])
    found = example_lengths(config, positions, segments, 0)
    assert found.tolist() == [[3, 3, 3, 2, 2, 1]]
    behind = jnp.concatenate([jnp.array([[0, 1]]), positions + 2], axis=1)
    found = example_lengths(config, behind, segments, 2)
    assert found.tolist() == [[5, 5, 5, 5, 5, 4, 4, 3]]
    assert example_lengths(config, positions, None, 0).tolist() == [[3] * 6]
    assert example_lengths(cases.tiny_llama(), positions, segments, 0) == 6
    assert layer_ropes(config, 24).amplitudes == 1.5


def test_only_the_first_dimensions_turn():
    x = jnp.asarray(cases.normal(0, 1, 4, 2, DIMS))
    turned = rotate(x, jnp.arange(4)[None], PLAIN[:3])
    np.testing.assert_array_equal(turned[..., 6:], x[..., 6:])
    whole = rotate(x[..., :6], jnp.arange(4)[None], PLAIN[:3])
    np.testing.assert_array_equal(turned[..., :6], whole)
    still = rotate(x, jnp.arange(4)[None], np.zeros(DIMS // 2, np.float32))
    np.testing.assert_array_equal(still, x)
