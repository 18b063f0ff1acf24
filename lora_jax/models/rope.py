"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), of one layer or of each.

Dimensions: B batch, T positions, S positions of a segment, L layers, R different embeddings,
N heads, H head size, P rotated pairs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models.config import DecoderConfig, Rope
from lora_jax.models.rope_scaling import Length, plain_frequencies


def inverse_frequencies(rope: Rope, length: Length = 1) -> Any:
    """Radians per position of each rotated pair, `[P]`, or `[B, T, 1, P]` where they follow
    lengths `[B, T]`; float32."""
    if rope.scaling is None:
        return plain_frequencies(rope.theta, rope.dims)
    return rope.scaling.frequencies(rope.theta, rope.dims, length)


def rotate(
    x_BTNH: jax.Array, positions_BT: jax.Array, frequencies: Any, amplitude: Any = 1.0
) -> jax.Array:
    """Turns each pair `(x[i], x[i + P])` of the first 2 P dimensions by `position * frequency[i]`
    and multiplies it by the amplitude, in float32; the others are unchanged."""
    if frequencies.ndim == 1:
        frequencies = frequencies[None, None, None]
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if not isinstance(amplitude, float) or amplitude != 1:
        cos, sin = cos * amplitude, sin * amplitude
    P = frequencies.shape[-1]
    left, right, rest = jnp.split(x_BTNH.astype(jnp.float32), [P, 2 * P], axis=-1)
    turned = [left * cos - right * sin, right * cos + left * sin]
    parts = [*turned, rest] if rest.shape[-1] else turned
    return jnp.concatenate(parts, axis=-1).astype(x_BTNH.dtype)


@dataclasses.dataclass(frozen=True)
class LayerRopes:
    """The RoPE of each layer.

    Attributes:
      which: `[L]` int32, to scan over; None where all layers have the same.
      frequencies: `[R, ..., P]`, or those of the same.
      amplitudes: `[R]`, or that of the same.
    """

    which: jax.Array | None
    frequencies: Any
    amplitudes: Any

    def rotate(self, x_BTNH: jax.Array, positions_BT: jax.Array, which: Any) -> jax.Array:
        """Rotates heads by the RoPE that `which` names."""
        if which is None:
            return rotate(x_BTNH, positions_BT, self.frequencies, self.amplitudes)
        amplitude = 1.0 if self.amplitudes is None else self.amplitudes[which]
        return rotate(x_BTNH, positions_BT, self.frequencies[which], amplitude)


def layer_ropes(config: DecoderConfig, length: Length) -> LayerRopes:
    """The RoPE of each layer for rows of a length, an int, or examples of lengths `[B, T]`."""
    distinct = list(dict.fromkeys(config.ropes))
    used = [rope for rope in distinct if rope is not None]
    pairs = used[0].dims // 2 if used else 1
    still = np.zeros(pairs, np.float32)  # no angle: a layer without RoPE
    tables = [still if rope is None else inverse_frequencies(rope, length) for rope in distinct]
    amplitudes = [1.0 if rope is None else rope.amplitude for rope in distinct]
    if len(distinct) == 1:
        return LayerRopes(None, tables[0], amplitudes[0])
    which = jnp.array([distinct.index(rope) for rope in config.ropes], jnp.int32)
    shape = max((table.shape for table in tables), key=len)
    lead = (None,) * (len(shape) - 1)
    tables = [table[lead] if table.ndim == 1 else table for table in tables]
    stacked = jnp.stack([jnp.broadcast_to(table, shape) for table in tables])
    scales = None if set(amplitudes) == {1.0} else jnp.array(amplitudes, jnp.float32)
    return LayerRopes(which, stacked, scales)


def example_lengths(
    config: DecoderConfig, positions_BT: jax.Array, segment_ids_BT: jax.Array | None, prompt: int
) -> Length:
    """The length that RoPE follows: of a packed position, that of its example; else of the row.

    Rows of a `prompt`, which all examples of a row see, follow the longest of them.
    """
    if not any(rope and rope.scaling and rope.scaling.follows_length for rope in config.ropes):
        return positions_BT.shape[1]
    lengths_BT = jnp.broadcast_to(positions_BT.max(axis=1, keepdims=True), positions_BT.shape) + 1
    if segment_ids_BT is None:
        return lengths_BT
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    own_BTS = jnp.broadcast_to(positions_BT[:, None, prompt:], same_BTS.shape)
    packed_BT = jnp.max(jnp.where(same_BTS, own_BTS, 0), axis=-1) + 1
    return jnp.concatenate([lengths_BT[:, :prompt], packed_BT], axis=1)
