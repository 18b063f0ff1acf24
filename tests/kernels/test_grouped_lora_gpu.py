"""The Hopper kernel under the GPU interpreter, with its race detector; what shared memory or an
output holds before it is written is NaN there."""

import dataclasses

import groups
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from lora_jax.kernels.grouped_lora import in_turn, mosaic_gpu

needs_interpreter = pytest.mark.skipif(
    not hasattr(getattr(plgpu, "InterpretGPUParams", None), "on_race"),
    reason="this jax has no interpreter of GPU kernels that raises on a race",
)


def interpreted(*arguments):
    how = plgpu.InterpretGPUParams(uninitialized_memory="nan", detect_races=True)  # raises
    return mosaic_gpu.grouped(*arguments, interpret=how)


def problem(sizes, **given):
    return groups.problem(sizes, **{"d_in": 64, "d_out": 64, "dtype": groups.BFLOAT16} | given)


@needs_interpreter
@pytest.mark.parametrize(
    "sizes, given",
    [
        ([1] * 5, {}),  # a block for all, of rows that are not there too
        ([9, 0, 3, 30, 25], {"rest": 7, "w": 2}),  # blocks that straddle segments
        ([0, 0], {"rest": 6}),  # no items
        ([70, 3], {"ranks": 24, "w": 2, "d_out": 192, "pages": 4}),  # of more than one tile
        ([4, 5], {"d_in": 640, "w": 1}),  # more steps than stages
        ([4, 5], {"d_in": 1024, "w": 1, "ranks": 32}),  # in parts
    ],
)
def test_is_the_product_in_float64_without_races(sizes, given):
    p = problem(sizes, **given)
    groups.assert_near(interpreted(*p.arrays()), groups.exact(p)[0])


@needs_interpreter
def test_the_other_way_is_the_gradient_of_x():
    p = problem([9, 0, 3], rest=2, d_out=128)
    dy = groups.cotangent(p)
    _, a, b, pages, sizes = p.arrays()
    groups.assert_near(interpreted(jnp.asarray(dy), b, a, pages, sizes), groups.exact(p, dy)[1])


@needs_interpreter
def test_a_batch_of_a_vmap_runs_in_turn():
    p = problem([3, 5])
    x, a, b, pages, sizes = p.arrays()
    both = jax.vmap(in_turn(interpreted), (None, None, None, 0, None))(
        x, a, b, jnp.stack([pages, pages[::-1]]), sizes
    )
    groups.assert_near(both[0], groups.exact(p)[0])
    groups.assert_near(both[1], groups.exact(dataclasses.replace(p, pages=p.pages[::-1]))[0])


def test_known_pages_come_first_and_fill_the_row():
    pages, known = mosaic_gpu.known_first(jnp.array([[-1, 4, -1, 2], [-1] * 4, [5, 6, 7, 8]]))
    assert known.tolist() == [2, 0, 4]
    assert pages.tolist()[::2] == [[4, 2, 4, 4], [5, 6, 7, 8]]


def test_every_token_has_a_row_in_an_item_of_its_segment():
    sizes, N = [5, 0, 9, 3], 20  # and three behind them
    tile = dataclasses.replace(mosaic_gpu.tiles(N, 4, 2, 8, 64, 64), m=8, items=6)
    pages, known = jnp.array([[1, 2], [3, 4], [5, 5], [0, 0]]), jnp.array([2, 2, 1, 0])
    items, place = mosaic_gpu.work_items(pages, known, jnp.array(sizes), N, tile)
    # Tokens 0-4 | 5-13, over two blocks | 14-16, over two, without pages | and items not in use.
    assert items[:3].tolist() == [[0, 2, 1, 2], [0, 1, 5, 5], [1, 1, 5, 5]]
    assert items[3:, 1].tolist() == [0, 0, 0]
    item, row = np.divmod(np.asarray(place), 8)
    assert item.tolist() == [0] * 5 + [1] * 3 + [2] * 6 + [6] * 6
    assert row[:14].tolist() == [n % 8 for n in range(14)]


@pytest.mark.parametrize("N, S", [(1, 1), (8, 8), (300, 8), (4096, 512)])
def test_work_follows_tokens_and_the_pages_of_segments(N, S):
    """Rows multiplied are at most those of the tokens, 64 for a wgmma, and those of one item more a
    segment; each item fetches its segment's pages once in either kernel, a tile at a time."""
    tile = mosaic_gpu.tiles(N, S, 2, 8, 4096, 14336)
    assert tile.items * tile.m <= N + S * tile.m and tile.m < max(2 * N / S, 16)
    assert 4096 % (tile.depth * tile.splits) == 0 and 14336 % tile.n == 0
    rng = np.random.default_rng(0)
    sizes = np.bincount(rng.integers(0, S, N), minlength=S).astype(np.int32)
    pages = rng.integers(0, 10**6, (S, 2)).astype(np.int32)
    pages[rng.random(pages.shape) < 0.3] = -1

    @jax.jit
    def items_of(pages, sizes):
        pages, known = mosaic_gpu.known_first(pages)
        return known, *mosaic_gpu.work_items(pages, known, sizes, N, tile)

    known, items, place = items_of(pages, sizes)
    in_blocks = np.where(sizes > 0, known, 0) * (-(-sizes // tile.m) + 1)
    assert items[:, mosaic_gpu.KNOWN].sum() <= in_blocks.sum()
    used = np.asarray(place)[np.repeat(known, sizes) > 0]
    assert (used < tile.items * tile.m).all() and len(set(used.tolist())) == len(used)


def test_what_fits():
    assert mosaic_gpu.fits(8, 1, 576, 192) and mosaic_gpu.fits(8, 32, 4096, 4096)
    assert not mosaic_gpu.fits(8, 33, 4096, 4096), "ranks beyond a wgmma's columns"
    assert not mosaic_gpu.fits(4, 2, 4096, 4096) and not mosaic_gpu.fits(8, 2, 4096, 100)
