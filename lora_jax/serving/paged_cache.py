"""Keys and values in pages that rows hold by number: a `LayeredCache` of the models.

Dimensions: L layers, P pages in all, Z positions a page, W pages of a row, R rows, T new positions,
N query heads, K key/value heads, H head size.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.context_mesh import TENSOR
from lora_jax.kernels.attention import cached_attention
from lora_jax.models.config import Attention, DecoderConfig


@flax.struct.dataclass
class Pages:
    """Keys and values `[L, P, Z, K, H]`; whose they are, the host knows."""

    k: jax.Array
    v: jax.Array


def init_pages(config: DecoderConfig, pages: int, page_size: int, dtype: Any) -> Pages:
    shape = (config.num_layers, pages, page_size, config.num_kv_heads, config.head_dim)
    return Pages(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def sharding(mesh: Mesh, config: DecoderConfig) -> NamedSharding:
    """Of pages, whose heads are split as training splits them where that divides them."""
    split = TENSOR if config.num_kv_heads % mesh.shape[TENSOR] == 0 else None
    return NamedSharding(mesh, PartitionSpec(None, None, None, split))


@flax.struct.dataclass
class PagedCache:
    """What rows have read, in pages.

    Attributes:
      pages: those of all rows, and of none.
      table: `[R, W]` int32, the pages of each row in the order of its positions; anything behind
        those that it needs.
      lengths: `[R]` int32, how many positions of each row are filled.
      counts: `[R]` int32, how many of the T positions that follow are a row's; what stands behind
        them is not written, and what it attends to means nothing.
      size: how many positions a row has at most.
    """

    pages: Pages
    table: jax.Array
    lengths: jax.Array
    counts: jax.Array
    size: int = flax.struct.field(pytree_node=False)

    def write(self, layer: jax.Array, k_RTKH: jax.Array, v_RTKH: jax.Array) -> "PagedCache":
        k, v = self.pages.k, self.pages.v
        following = jnp.arange(k_RTKH.shape[1])[None]
        positions = self.lengths[:, None] + following
        columns, offsets = positions // k.shape[2], positions % k.shape[2]
        numbers = jnp.take_along_axis(self.table, columns, axis=1, mode="clip")
        none = k.shape[1]  # beyond the last page, where a write is dropped
        numbers = jnp.where(following < self.counts[:, None], numbers, none)
        where = (layer, numbers, offsets)
        k = k.at[where].set(k_RTKH.astype(k.dtype), mode="drop")
        v = v.at[where].set(v_RTKH.astype(v.dtype), mode="drop")
        return dataclasses.replace(self, pages=Pages(k, v))

    def attend(
        self, layer: jax.Array, q_RTNH: jax.Array, how: Attention, window: jax.Array | None
    ) -> jax.Array:
        positions = self.lengths[:, None] + jnp.arange(q_RTNH.shape[1])[None]
        # What another row left in a page may be NaN, and 0 * NaN is.
        slots = jnp.arange(self.table.shape[1] * self.pages.k.shape[2])
        filled_RS = slots[None] < (self.lengths + self.counts)[:, None]
        k, v = self._row(self.pages.k, layer), self._row(self.pages.v, layer)
        v = jnp.where(filled_RS[..., None, None], v, jnp.zeros_like(v))
        return cached_attention(
            q_RTNH, k, v, positions, scale=how.scale, cap=how.cap, window=window
        )

    def read(self, count: int) -> "PagedCache":
        del count  # rows differ
        return dataclasses.replace(self, lengths=self.lengths + self.counts)

    def _row(self, pages_LPZKH: jax.Array, layer: jax.Array) -> jax.Array:
        """`[R, W * Z, K, H]`, a row's positions one after another."""
        rows = pages_LPZKH.at[layer, self.table].get(mode="clip")
        return rows.reshape(self.table.shape[0], -1, *pages_LPZKH.shape[3:])
