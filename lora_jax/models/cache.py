"""What a model keeps of the positions that it has read.

Dimensions: L layers, B batch, S positions, K key/value heads, H head size.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lora_jax.models.config import DecoderConfig
from lora_jax.paths import is_known


@flax.struct.dataclass
class Cache:
    """Keys and values of what was read so far.

    Attributes:
      k, v: `[L, B, S, K, H]`, for S positions at most, of any float dtype.
      lengths: `[B]` int32, how many positions of each row are filled.
    """

    k: jax.Array
    v: jax.Array
    lengths: jax.Array


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
