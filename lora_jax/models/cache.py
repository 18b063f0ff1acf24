"""The keys and values of the positions that a model has read.

Dimensions: L layers, B batch, T new positions, S positions, N query heads, K key/value heads,
H head size.
"""

import dataclasses
from typing import Any, Protocol, Self

import flax.struct
import jax
import jax.numpy as jnp

from lora_jax.kernels.attention import cached_attention
from lora_jax.models.config import Attention, DecoderConfig
from lora_jax.paths import is_known


class LayeredCache(Protocol):
    """The protocol of a cache: a pytree that a decoder carries from layer to layer.

    Attributes:
      lengths: `[B]` int32, how many positions of each row are filled.
      size: how many positions a row has at most.
    """

    @property
    def lengths(self) -> jax.Array: ...

    @property
    def size(self) -> int: ...

    def write(self, layer: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> Self:
        """With one layer's keys and values of the T positions that follow `lengths`."""
        ...

    def attend(
        self, layer: jax.Array, q_BTNH: jax.Array, how: Attention, window: jax.Array | None
    ) -> jax.Array:
        """Attention `[B, T, N, H]` of the T positions that follow `lengths`, one layer of them
        written, to their own and earlier keys, the nearest `window` of them."""
        ...

    def read(self, count: int) -> Self:
        """With the `count` positions that were written counted in `lengths`."""
        ...


@flax.struct.dataclass
class Cache:
    """Keys and values of the positions read so far, those of a row contiguous.

    Attributes:
      k, v: `[L, B, S, K, H]`, for S positions at most, of any float dtype.
      lengths: `[B]` int32, how many positions of each row are filled.
    """

    k: jax.Array
    v: jax.Array
    lengths: jax.Array

    @property
    def size(self) -> int:
        return self.k.shape[2]

    def write(self, layer: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> "Cache":
        rows, positions = jnp.arange(k_BTKH.shape[0])[:, None], self._following(k_BTKH.shape[1])
        k = self.k.at[layer, rows, positions].set(k_BTKH.astype(self.k.dtype))
        v = self.v.at[layer, rows, positions].set(v_BTKH.astype(self.v.dtype))
        return dataclasses.replace(self, k=k, v=v)

    def attend(
        self, layer: jax.Array, q_BTNH: jax.Array, how: Attention, window: jax.Array | None
    ) -> jax.Array:
        positions = self._following(q_BTNH.shape[1])
        k, v = self.k[layer], self.v[layer]
        return cached_attention(
            q_BTNH, k, v, positions, scale=how.scale, cap=how.cap, window=window
        )

    def read(self, count: int) -> "Cache":
        return dataclasses.replace(self, lengths=self.lengths + count)

    def _following(self, count: int) -> jax.Array:
        return self.lengths[:, None] + jnp.arange(count)[None]


def init_cache(config: DecoderConfig, batch: int, length: int, dtype: Any) -> Cache:
    """An empty cache for `batch` rows of up to `length` positions."""
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))


def require_room(cache: Cache, count: int) -> None:
    """Raises ValueError if `count` more positions exceed the cache, as far as that is known."""
    size = cache.k.shape[2]
    filled = int(cache.lengths.max(initial=0)) if is_known(cache.lengths) else 0
    if filled + count > size:
        raise ValueError(
            f"a cache of {size} positions, {filled} of them filled, has no room for {count} more: "
            "make a longer one, init_cache(config, batch, length, dtype)."
        )
