"""Grouped LoRA on a TPU: a work item is a block of tokens beside the pages of one segment in it.

Scalars, prefetched, say which block and which pages an item reads; each of a segment's W pages is
an operand of its own, so that they are fetched side by side and multiplied as one factor of W r
ranks. Items of one block follow each other and add up in VMEM. A block that several segments share
has an item for each, and rows of the others are masked. Where a segment has fewer than W pages, an
operand names the page that it held before, which is not fetched again. The grid ends with the last
item in use.

Dimension key: N tokens, D = d_in, O = d_out, P pages, W pages of a segment, r ranks of a page,
R = W r, S segments, G items, B blocks, m and n the sides of an output tile.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lora_jax.kernels.grouped_lora.gathering import segment_of

LANES = 128
MOST_ROWS, FEWEST_ROWS = 256, 16
WIDEST = 4096  # columns of an output tile: each tile narrows its tokens anew
VMEM_LIMIT = 32 * 2**20
BUDGET = 24 * 2**20  # of what is counted here; the compiler keeps values beside it


@dataclasses.dataclass(frozen=True)
class Tiles:
    m: int
    n: int


def tiles(N: int, S: int, D: int, O: int, R: int, x_bytes: int, page_bytes: int) -> Tiles | None:  # noqa: E741
    """The output tiles; None for shapes that VMEM does not hold.

    Blocks are about as long as segments: a longer one is masked for most of its segments.
    """
    most = min(max(pl.next_power_of_2(pl.cdiv(N, S)), 2 * FEWEST_ROWS), MOST_ROWS)
    n = min(pl.cdiv(O, LANES) * LANES, WIDEST)
    while n >= LANES:
        m = most
        while m >= FEWEST_ROWS:
            # Two buffers of every operand, the factors side by side, and the sum in float32.
            factors = R * (D + n) * (2 * page_bytes + x_bytes)
            values = 2 * m * (D + n) * x_bytes + 2 * m * n * 4
            if factors + values <= BUDGET:
                return Tiles(m, n)
            m //= 2
        n = n // 2 // LANES * LANES
    return None


def grouped(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    pages: jax.Array,
    sizes: jax.Array,
    *,
    interpret: Any = False,
) -> jax.Array:
    """`y [N, O]`, for shapes that `tiles` has tiles for and r a multiple of 8."""
    (N, D), (P, r, O), (S, W) = x.shape, b.shape, pages.shape  # noqa: E741
    tile = tiles(N, S, D, O, W * r, x.dtype.itemsize, a.dtype.itemsize)
    assert tile, "checked by the dispatch"
    items, count = work_items(pages, sizes, N, tile.m, P)

    def of_page(j, of_output, n, i, block, low, high, known, page):
        del block, low, high, known
        return (page[i * W + j], 0, n if of_output else 0)

    blocks = partial(pl.BlockSpec, memory_space=pltpu.VMEM)
    return pl.pallas_call(
        partial(_body, W=W, r=r, m=tile.m),
        out_shape=jax.ShapeDtypeStruct(
            (N, O), x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(items),
            grid=(pl.cdiv(O, tile.n), count),
            in_specs=[
                blocks((tile.m, D), lambda n, i, block, *_: (block[i], 0)),
                *(blocks((1, r, D), partial(of_page, j, False)) for j in range(W)),
                *(blocks((1, r, tile.n), partial(of_page, j, True)) for j in range(W)),
            ],
            out_specs=blocks((tile.m, tile.n), lambda n, i, block, *_: (block[i], n)),
            scratch_shapes=[pltpu.VMEM((tile.m, tile.n), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret,
        name="grouped_lora",
    )(*items, x, *[a] * W, *[b] * W)


def work_items(
    pages: jax.Array, sizes: jax.Array, N: int, m: int, P: int
) -> tuple[list[jax.Array], jax.Array]:
    """`[block [G + 1], low [G], high [G], known [G W], page [G W]]`, and how many are in use.

    An item is the tokens `low <= n < high` of a block; the tokens behind the last segment are one
    more segment, without pages, so that every block has an item and is written.
    """
    S, W = pages.shape
    B = pl.cdiv(N, m)
    G = B + S
    sizes = jnp.append(sizes, jnp.maximum(B * m - sizes.sum(), 0)).astype(jnp.int32)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    starts = ends - sizes
    first = starts // m
    blocks_S = jnp.where(sizes > 0, (ends - 1) // m - first + 1, 0)
    last = jnp.cumsum(blocks_S, dtype=jnp.int32)
    item = jnp.arange(G, dtype=jnp.int32)
    segment = jnp.minimum(segment_of(item, last), S)
    block = first[segment] + item - (last - blocks_S)[segment]
    block = jnp.append(jnp.clip(block, 0, B - 1), -1)
    page = jnp.concatenate([pages, jnp.full((1, W), -1, pages.dtype)])[segment].astype(jnp.int32)
    known = (page >= 0).astype(jnp.int32)
    named = jax.lax.cummax(jnp.where(known == 1, item[:, None], 0), axis=0)
    held = jnp.clip(jnp.take_along_axis(page, named, axis=0), 0, P - 1)
    scalars = [block, starts[segment], ends[segment], known.reshape(-1), held.reshape(-1)]
    return scalars, last[-1]


def _body(block_ref, low_ref, high_ref, known_ref, page_ref, x_ref, *refs, W, r, m):
    """Adds one item's part of a tile of `y [m, n]`; items of one block follow each other."""
    del page_ref
    a_refs, b_refs, (y_ref, acc_ref) = refs[:W], refs[W : 2 * W], refs[2 * W :]
    i = pl.program_id(1)
    block = block_ref[i]

    @pl.when((i == 0) | (block_ref[jnp.maximum(i - 1, 0)] != block))
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    known = [known_ref[i * W + j] == 1 for j in range(W)]

    @pl.when(sum(known_ref[i * W + j] for j in range(W)) > 0)
    def _():
        def side_by_side(refs):  # what another page left there may be NaN
            parts = [jnp.where(k, ref[0], 0) for k, ref in zip(known, refs, strict=True)]
            return jnp.concatenate(parts).astype(x_ref.dtype)

        h = _dot(x_ref[...], side_by_side(a_refs), 1)
        row = block * m + jax.lax.broadcasted_iota(jnp.int32, h.shape, 0)
        mine = (row >= low_ref[i]) & (row < high_ref[i])
        h = jnp.where(mine, h, 0).astype(x_ref.dtype)
        acc_ref[...] += _dot(h, side_by_side(b_refs), 0)

    @pl.when((i == pl.num_programs(1) - 1) | (block_ref[i + 1] != block))
    def _():
        y_ref[...] = acc_ref[...].astype(y_ref.dtype)


def _dot(x, w, contracted):
    return jax.lax.dot_general(
        x,
        w,
        (((1,), (contracted,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
