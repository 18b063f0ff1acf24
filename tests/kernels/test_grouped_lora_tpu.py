"""The TPU kernel under the TPU interpreter, with its race detector; it poisons what is not read."""

import dataclasses

import groups
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from lora_jax.kernels.grouped_lora import in_turn, mosaic_tpu

BF16, F32 = groups.BFLOAT16, np.float32


def interpreted(*arguments):
    how = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    return mosaic_tpu.grouped(*arguments, interpret=how)


def assert_no_race(capfd):
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "sizes, rest, shapes, dtype",
    [
        ([1] * 5, 0, {}, F32),  # a block for all, of rows that are not there too
        ([1] * 5, 0, {}, BF16),
        ([40, 0, 3, 30, 60], 7, {}, F32),  # blocks that straddle segments
        ([40, 0, 3, 30, 60], 7, {"page_dtype": F32}, BF16),
        ([0, 0, 0], 70, {}, F32),  # nothing but zeros to write
        ([33, 31], 0, {"d_in": 200, "d_out": 4300, "w": 1, "ranks": 16}, F32),  # tiles of columns
    ],
)
def test_is_the_product_in_float64_without_races(sizes, rest, shapes, dtype, capfd):
    p = groups.problem(sizes, rest=rest, dtype=dtype, **shapes)
    groups.assert_near(interpreted(*p.arrays()), groups.exact(p)[0])
    assert_no_race(capfd)


def test_the_other_way_is_the_gradient_of_x(capfd):
    p = groups.problem([40, 0, 3, 30], rest=7, dtype=F32)
    dy = groups.cotangent(p)
    _, a, b, pages, sizes = p.arrays()
    dx = interpreted(jnp.asarray(dy), b, a, pages, sizes)
    groups.assert_near(dx, groups.exact(p, dy)[1])
    assert_no_race(capfd)


def test_a_batch_of_a_vmap_runs_in_turn():
    p = groups.problem([3, 5], dtype=F32)
    x, a, b, pages, sizes = p.arrays()
    both = jax.vmap(in_turn(interpreted), (0, None, None, 0, None))(
        jnp.stack([x, x]), a, b, jnp.stack([pages, pages[::-1]]), sizes
    )
    groups.assert_near(both[0], groups.exact(p)[0])
    groups.assert_near(both[1], groups.exact(dataclasses.replace(p, pages=p.pages[::-1]))[0])


def test_items_cover_every_block_once_a_segment_and_hold_pages_over():
    pages = jnp.array([[4, 2], [-1, -1], [-1, 3]])
    scalars, count = mosaic_tpu.work_items(pages, jnp.array([5, 0, 9]), N=24, m=8, P=6)
    block, low, high, known, page = (np.asarray(array) for array in scalars)
    # Tokens 0-4 | 5-13, over two blocks | the rest, over two.
    assert count == 5
    assert block[:5].tolist() == [0, 0, 1, 1, 2]
    assert [*zip(low, high, strict=True)][:5] == [(0, 5), (5, 14), (5, 14), (14, 24), (14, 24)]
    assert known.reshape(-1, 2)[:5].tolist() == [[1, 1], [0, 1], [0, 1], [0, 0], [0, 0]]
    assert page.reshape(-1, 2)[:5].tolist() == [[4, 2], [4, 3], [4, 3], [4, 3], [4, 3]]


def test_tiles_shrink_to_what_vmem_holds():
    def of(*arguments):
        return mosaic_tpu.tiles(*arguments)

    assert of(8, 8, 4096, 4096, 64, 2, 2) == mosaic_tpu.Tiles(m=32, n=4096)
    assert of(4096, 4, 4096, 14336, 16, 2, 2).m == 256
    assert of(4096, 4, 14336, 4096, 64, 2, 2).m < 256
    assert of(8, 8, 10**6, 4096, 64, 2, 2) is None
