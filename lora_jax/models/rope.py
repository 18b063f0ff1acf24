"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), with Llama 3.1's scaling."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models.config import DecoderConfig, RopeScaling


def inverse_frequencies(config: DecoderConfig) -> np.ndarray:
    """Radians per position of each rotated pair, `[head_dim / 2]`, float32."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    frequencies = (1.0 / config.rope_theta**exponents).astype(np.float32)
    return (
        frequencies if config.rope_scaling is None else _stretch(frequencies, config.rope_scaling)
    )


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, config: DecoderConfig) -> jax.Array:
    """Turns each pair `(x[i], x[i + H/2])` by `position * frequency[i]`, in float32."""
    frequencies = inverse_frequencies(config)[None, None, None]
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    left, right = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


def _stretch(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((scaling.original_context / wavelengths - low) / (high - low), 0, 1)
    return ((1 - keep) * frequencies / scaling.factor + keep * frequencies).astype(np.float32)
