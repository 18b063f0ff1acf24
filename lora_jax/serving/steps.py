"""The steps of an engine as pure functions: rows read tokens on from their pages, then choose.

Dimensions: R rows, T tokens of each, W pages of a row, D hidden, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import output_head, read_on
from lora_jax.serving import placement
from lora_jax.serving.paged_cache import PagedCache, Pages
from lora_jax.weights import PyTree

Bind = Callable[[PyTree, PyTree, jax.Array, jax.Array], PyTree]


@flax.struct.dataclass
class Batch:
    """What the rows of a step read, all of it data.

    Attributes:
      tokens: `[R, T]` int32; the first `counts [R]` of a row are its own. A row of none is idle.
      lengths: `[R]` int32, how many positions its pages hold already.
      table: `[R, W]` int32, the pages.
      adapter_pages, adapter_slots: `[R, w]` and `[R]` int32, where the bank holds its adapter.
    """

    tokens: jax.Array
    counts: jax.Array
    lengths: jax.Array
    table: jax.Array
    adapter_pages: jax.Array
    adapter_slots: jax.Array


def read(
    config: DecoderConfig,
    bind: Bind,
    max_length: int,
    base: PyTree,
    bank: PyTree,
    pages: Pages,
    batch: Batch,
) -> tuple[Pages, jax.Array]:
    """Reads every row's tokens into `pages`. Returns them and the logits `[R, V]` of what follows
    the last token of each row, which `sampling.choose_each` reads.

    Args:
      config: the shape of the model.
      bind: `(base, bank, adapter_pages, adapter_slots) -> weights`.
      max_length: how many positions a row has at most.
      base: the model's frozen weights, of any type.
      bank: the adapters on the device.
      pages: keys and values; donate them, and the step writes in place.
      batch: the rows.
    """
    base = placement.by_device(base, config.family.sharding)
    weights = bind(base, bank, batch.adapter_pages, batch.adapter_slots)
    size = min(max_length, batch.table.shape[1] * pages.k.shape[2])
    cache = PagedCache(pages, batch.table, batch.lengths, batch.counts, size)
    x_RTD, cache = read_on(weights, batch.tokens, cache, config)
    last_R = jnp.maximum(batch.counts - 1, 0)
    x_RD = jnp.take_along_axis(x_RTD, last_R[:, None, None], axis=1)[:, 0]
    return cache.pages, config.family.read_out(x_RD, output_head(weights), config)


def jitted(config: DecoderConfig, bind: Bind, max_length: int, shardings: Any = None) -> Any:
    """`read` of base, bank, pages and batch, jitted: pages are taken over. `shardings` of pages and
    of logits, if the base is sharded over several devices."""
    step = functools.partial(read, config, bind, max_length)
    return jax.jit(step, donate_argnums=2, out_shardings=shardings)
