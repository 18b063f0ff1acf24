"""Grouped LoRA on Hopper, through Pallas' Mosaic GPU backend: two kernels, narrow and widen.

Tokens are cut into aligned blocks, since a swizzled copy starts at a multiple of 8 rows; an item is
a block beside one segment that has tokens in it. Narrow multiplies an item's block by its segment's
pages, `h [m, R]`, with the contraction split over thread blocks where items are few; XLA adds the
parts and sets ranks of absent pages to 0. Widen multiplies h by the pages of b, a tile of columns
for each thread block. Both write all rows of an item, and XLA picks each token's row from the item
of its own segment, in a program that it can fuse with the addition to `x @ W`.

The copy engine fetches pages one by one, by indices read in the kernel, into one operand of wgmma.
That multiplies 64 rows at a time: those beyond m are whatever shared memory held, and stay in their
own rows. It contracts 16 ranks at a time, so pages of 8 are taken by two; beside an odd last one
stands the segment's first page, with zeros in h. A segment's known pages come first, and absent
ones are not fetched.

There are at most `N / m + S` items, m about the mean length of a segment and at most 64. Each does
`2 * 64 (R D + K O)` operations for K known ranks, rounded up to what is contracted together, and
reads m rows of x and its known pages once. P is nowhere among the terms.

bfloat16 alone. wgmma would shorten float32 to tf32, and compiling widen so ends in Mosaic's "Only
f16 WGMMA supports transposes": b is stored rank first, which is its contracted axis.

Dimension key: N tokens, D = d_in, O = d_out, P pages, W pages of a segment, r ranks of a page,
R = W r, S segments, I items, m and n the sides of an output tile.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lora_jax.kernels.grouped_lora.gathering import segment_of

WGMMA_ROWS = 64
WGMMA_DEPTH = 16
WGMMA_COLUMNS = 256  # at most
SWIZZLED = 64  # columns of 128 bytes
STAGES = 4
BLOCKS = 2 * 132  # thread blocks that fill the multiprocessors
BLOCK, KNOWN, PAGES = range(3)  # columns of an item


@dataclasses.dataclass(frozen=True)
class Tiles:
    """`m` rows of an item, `items`, and how each of the two products is cut.

    Narrow contracts `depth` at a time, `stages` of them in flight, in `splits` parts; widen makes
    `n` columns.
    """

    m: int
    items: int
    depth: int
    splits: int
    stages: int
    n: int


def fits(r: int, W: int, D: int, O: int) -> bool:  # noqa: E741
    """Whether the kernel takes W pages of r ranks, in both directions."""
    return r % 8 == 0 and _whole(W, r) * r <= WGMMA_COLUMNS and D % 64 == 0 and O % 64 == 0


def tiles(N: int, S: int, W: int, r: int, D: int, O: int) -> Tiles:  # noqa: E741
    """The tiles of one direction, of pages that `fits` takes."""
    R = _whole(W, r) * r
    m = min(max(pl.next_power_of_2(pl.cdiv(N, S)), 8), WGMMA_ROWS)
    items = pl.cdiv(N, m) + S - 1
    depth = 2 * SWIZZLED if R <= 128 and D % (2 * SWIZZLED) == 0 else SWIZZLED
    steps = D // depth
    fill = [s for s in range(2, steps + 1) if steps % s == 0 and items * s <= BLOCKS]
    splits = max((s for s in fill if steps // s >= STAGES), default=1)
    widths = [n for n in (64, 128, 256) if O % n == 0]
    n = next((n for n in widths if items * (O // n) <= BLOCKS), widths[-1])
    return Tiles(m, items, depth, splits, min(STAGES, steps // splits), n)


def _group(r: int) -> int:
    """Pages that are contracted together."""
    return math.lcm(r, WGMMA_DEPTH) // r


def _whole(W: int, r: int) -> int:
    """W pages, or those that fill groups."""
    return W + -W % _group(r)


def grouped(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    pages: jax.Array,
    sizes: jax.Array,
    *,
    interpret: Any = None,
) -> jax.Array:
    """`y [N, O]`, for bfloat16 and pages that `fits` takes."""
    (N, D), (_, r, O), (S, W) = x.shape, b.shape, pages.shape  # noqa: E741
    tile = tiles(N, S, W, r, D, O)
    pages = jnp.pad(pages.astype(jnp.int32), ((0, 0), (0, -W % _group(r))), constant_values=-1)
    items, place_N = work_items(*known_first(pages), sizes.astype(jnp.int32), N, tile)
    x = jnp.pad(x, ((0, -N % tile.m), (0, 0)))
    h_ImR = _narrow(tile, interpret, items, x, a).sum(0)
    rank_11R = jnp.arange(h_ImR.shape[-1], dtype=jnp.int32)[None, None]
    known_I1R = rank_11R < r * items[:, KNOWN, None, None]
    h_ImR = jnp.where(known_I1R, h_ImR, 0).astype(x.dtype)
    y_ImO = _widen(tile, interpret, items, h_ImR, b)
    return y_ImO.reshape(-1, O).at[place_N].get(mode="fill", fill_value=0)


def known_first(pages_SW: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each segment's pages without gaps, its first one again behind them; and how many it has."""
    known_SW = pages_SW >= 0
    place_SW = jnp.cumsum(known_SW, axis=1, dtype=jnp.int32) - 1
    column_1W1 = jnp.arange(pages_SW.shape[1], dtype=jnp.int32)[None, :, None]
    moved_SWW = known_SW[:, None] & (place_SW[:, None] == column_1W1)
    found_SW = jnp.where(moved_SWW, pages_SW[:, None], 0).sum(2, dtype=jnp.int32)
    return (
        jnp.where(moved_SWW.any(2), found_SW, found_SW[:, :1]),
        known_SW.sum(1, dtype=jnp.int32),
    )


def work_items(
    pages_SW: jax.Array, known_S: jax.Array, sizes_S: jax.Array, N: int, tile: Tiles
) -> tuple[jax.Array, jax.Array]:
    """Items `[I, 2 + W]`, those not in use without pages; and the row of `[I m]` of each token,
    one beyond the last for a token without pages."""
    ends = jnp.cumsum(sizes_S, dtype=jnp.int32)
    first = (ends - sizes_S) // tile.m
    blocks = jnp.where(sizes_S > 0, (ends - 1) // tile.m - first + 1, 0)
    last = jnp.cumsum(blocks, dtype=jnp.int32)
    offset = last - blocks - first  # from a block to the item of a segment
    item, token = (jnp.arange(n, dtype=jnp.int32) for n in (tile.items, N))

    def of(segment, values):
        return values.at[segment].get(mode="fill", fill_value=0)

    segment = segment_of(item, last)
    block = jnp.maximum(item - of(segment, offset), 0)
    columns = jnp.stack([block, of(segment, known_S)], axis=1)
    items = jnp.concatenate([columns, of(segment, pages_SW)], axis=1)
    segment = segment_of(token, ends)
    row = of(segment, offset) * tile.m + token
    return items, jnp.where(of(segment, known_S) > 0, row, tile.items * tile.m)


def _swizzled(width):
    """Tiles of `width` 16-bit columns, in the order that wgmma reads without bank conflicts."""
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width)


def _kernel(body, shape, dtype, grid, interpret, **scratch):
    """A warpgroup for each part of each item. CUDA bounds all axes of a grid but the last."""
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        scratch_types=scratch,
        grid=grid,
        grid_names=("part", "item"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )


def _narrow(tile, interpret, items, x, a):
    """Parts of `h = x @ a.T`, `[splits, I, m, R]`; undefined at absent pages."""
    W, r = items.shape[1] - PAGES, a.shape[1]
    R = W * r
    steps = x.shape[1] // tile.depth // tile.splits

    def body(items, x, a, parts, *, x_tile, a_tile, h_tile, loaded):
        i, part = lax.axis_index("item"), lax.axis_index("part")
        rows, known = pl.ds(items[i, BLOCK] * tile.m, tile.m), items[i, KNOWN]

        def load(step):
            slot = lax.rem(step, tile.stages)
            at = pl.ds((part * steps + step) * tile.depth, tile.depth)
            to = x_tile.at[slot, pl.ds(0, tile.m)]
            plgpu.copy_gmem_to_smem(x.at[rows, at], to, loaded.at[slot])

            @pl.loop(0, known)
            def _(j):
                to = a_tile.at[slot, pl.ds(j * r, r)]
                plgpu.copy_gmem_to_smem(a.at[items[i, PAGES + j], :, at], to, loaded.at[slot])

            @pl.loop(known, W)
            def _(j):
                plgpu.barrier_arrive(loaded.at[slot])

        def product(acc):
            @pl.loop(0, steps)
            def _(step):
                slot = lax.rem(step, tile.stages)
                plgpu.barrier_wait(loaded.at[slot])
                plgpu.wgmma(acc, x_tile.at[slot], a_tile.at[slot].transpose((1, 0)))
                plgpu.wgmma_wait(0)

                @pl.when(step + tile.stages < steps)
                def _():
                    load(step + tile.stages)

            return acc[...]

        @pl.when(known > 0)
        def _():
            pl.loop(0, tile.stages)(load)
            h_tile[...] = pl.run_scoped(product, plgpu.ACC((WGMMA_ROWS, R), jnp.float32))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(h_tile.at[pl.ds(0, tile.m)], parts.at[part, i])
            plgpu.wait_smem_to_gmem(0)

    return _kernel(
        body,
        (tile.splits, tile.items, tile.m, R),
        jnp.float32,
        (tile.splits, tile.items),
        interpret,
        x_tile=plgpu.SMEM(
            (tile.stages, WGMMA_ROWS, tile.depth), x.dtype, transforms=_swizzled(SWIZZLED)
        ),
        a_tile=plgpu.SMEM((tile.stages, R, tile.depth), x.dtype, transforms=_swizzled(SWIZZLED)),
        h_tile=plgpu.SMEM((WGMMA_ROWS, R), jnp.float32),
        loaded=plgpu.Barrier(num_arrivals=1 + W, num_barriers=tile.stages),
    )(items, x, a)


def _widen(tile, interpret, items, h, b):
    """`y = h @ b`, `[I, m, O]`; undefined for items without pages."""
    r, O = b.shape[1:]  # noqa: E741
    group = _group(r)
    depth = group * r
    most = h.shape[2] // depth
    width = next(w for w in (64, 32, 16) if depth % w == 0)

    def body(items, h, b, y, *, h_tile, b_tile, y_tile, loaded):
        i, part = lax.axis_index("item"), lax.axis_index("part")
        at, known = pl.ds(part * tile.n, tile.n), items[i, KNOWN]
        groups = lax.div(known + group - 1, group)

        def load(g):
            to = h_tile.at[g, pl.ds(0, tile.m)]
            plgpu.copy_gmem_to_smem(h.at[i, :, pl.ds(g * depth, depth)], to, loaded.at[g])
            for j in range(group):
                page = b.at[items[i, PAGES + g * group + j], :, at]
                plgpu.copy_gmem_to_smem(page, b_tile.at[g, pl.ds(j * r, r)], loaded.at[g])

        def product(acc):
            @pl.loop(0, groups)
            def _(g):
                plgpu.barrier_wait(loaded.at[g])
                plgpu.wgmma(acc, h_tile.at[g], b_tile.at[g])
                plgpu.wgmma_wait(0)

            return acc[...].astype(y_tile.dtype)

        @pl.when(known > 0)
        def _():
            pl.loop(0, groups)(load)
            y_tile[...] = pl.run_scoped(product, plgpu.ACC((WGMMA_ROWS, tile.n), jnp.float32))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y_tile.at[pl.ds(0, tile.m)], y.at[i, :, at])
            plgpu.wait_smem_to_gmem(0)

    return _kernel(
        body,
        (tile.items, tile.m, O),
        h.dtype,
        (O // tile.n, tile.items),
        interpret,
        h_tile=plgpu.SMEM((most, WGMMA_ROWS, depth), h.dtype, transforms=_swizzled(width)),
        b_tile=plgpu.SMEM((most, depth, tile.n), h.dtype, transforms=_swizzled(width)),
        y_tile=plgpu.SMEM((WGMMA_ROWS, tile.n), h.dtype),
        loaded=plgpu.Barrier(num_arrivals=1 + group, num_barriers=most),
    )(items, h, b)
