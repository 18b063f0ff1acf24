"""NF4 matmul on Hopper, through Pallas' Mosaic GPU backend.

wgmma takes its left operand from registers, so the weight is the left operand and the product is
computed transposed: `y.T = W.T @ x.T` or `dx.T = W @ dy.T`. A 16-bit word of the packed weight holds
a 2 x 2 patch of `W`: rows `2 h`, `2 h + 1` and columns `2 p`, `2 p + 1`. Decoded, the words are four
left operands of the same shape, one a corner of the patch. Forward, the corners of one column
parity share an accumulator, and those of one row parity a right operand; backward, the other way
round. So nothing is interleaved in the kernel: `x`, `absmax` and the result are split by parity
outside it, by programs of XLA that fuse with their neighbours. Where a result has few tiles, the
contraction is split over thread blocks, and XLA adds the parts.

bfloat16 is multiplied as it is. wgmma would shorten float32 to tf32, so float32 is written as a sum
of three bfloat16 terms on both sides.

Dimension key: M rows, D contracted words, R words along the result, H = K / 2, P = N / 2, B blocks.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lora_jax.kernels.nf4_matmul.reference import CODEBOOK

WGMMA_ROWS = 64
DEPTH = 64  # words of the contraction in a step of the pipeline
PART = 32  # and in one wgmma: as many as registers hold in float32
MULTIPROCESSORS = 132
STAGES = 4


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows `m` of a tile, warpgroups that compute, and parts that the contraction is split into."""

    m: int
    warpgroups: int
    splits: int

    @property
    def r(self) -> int:
        return WGMMA_ROWS * self.warpgroups


def tiles(M: int, K: int, N: int, block: int, *, transpose: bool) -> Tiles | None:
    """The tiles of one product; None for shapes that the kernel lacks, in either direction."""
    if M == 0 or K % 256 or N % 256 or block not in (32, 64, 128):
        return None
    m = next((m for m in (8, 16, 32, 64) if m >= M), 128)
    warpgroups = 1 if m == 128 else 2
    R, D = (K // 2, N // 2) if transpose else (N // 2, K // 2)
    blocks, steps = (R // (WGMMA_ROWS * warpgroups)) * pl.cdiv(M, m), D // DEPTH
    splits = [s for s in (16, 8, 4, 2) if steps % s == 0 and blocks * s <= 2 * MULTIPROCESSORS]
    return Tiles(m, warpgroups, next((s for s in splits if steps // s >= STAGES), 1))


def matmul(
    x: jax.Array,
    codes: jax.Array,
    absmax: jax.Array,
    *,
    transpose: bool,
    interpret: Any = None,
) -> jax.Array:
    """`x [M, K] @ W`, or `x [M, N] @ W.T`, for shapes that `tiles` has tiles for."""
    M, (H, N), B = x.shape[0], codes.shape, absmax.shape[0]
    block = 2 * H // B
    terms = 1 if x.dtype == jnp.bfloat16 else 3
    tile = tiles(M * terms, 2 * H, N, block, transpose=transpose)
    assert tile, "checked by the dispatch"
    x = jnp.concatenate(_terms(x, terms))
    x = jnp.pad(x, ((0, -len(x) % tile.m), (0, 0)))
    words = lax.bitcast_convert_type(codes.reshape(H, N // 2, 2), jnp.uint16)
    y_S2RM = _kernel(tile, block, terms, transpose, interpret)(
        *_parities(x), words, *_parities(absmax)
    )
    y_2RM = y_S2RM.sum(0)[..., : M * terms]
    y_2RM = y_2RM.reshape(*y_2RM.shape[:2], terms, M).sum(2)
    return y_2RM.transpose(2, 1, 0).reshape(M, -1).astype(x.dtype if terms == 1 else jnp.float32)


def _terms(x, count):
    """bfloat16 arrays that add up to `x`, the largest first; all but the last are cut, not rounded.

    A cut is an operation on bits: XLA may drop a rounding to bfloat16 and back.
    """
    terms = []
    for _ in range(count - 1):
        bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        cut = lax.bitcast_convert_type(bits, jnp.float32)
        terms.append(cut.astype(jnp.bfloat16))
        x = x - cut
    return [*terms, x.astype(jnp.bfloat16)]


def _parities(x):
    """The even and the odd columns."""
    return x[:, 0::2], x[:, 1::2]


def _kernel(tile, block, terms, transpose, interpret):
    """The function of `(x_even, x_odd, words, absmax_even, absmax_odd)` that fills `[S, 2, R, M]`."""

    def program(x0, x1, words, s0, s1):
        M, D = x0.shape
        R = words.shape[0] if transpose else words.shape[1]
        steps = D // DEPTH // tile.splits
        return plgpu.kernel(
            partial(_body, tile=tile, block=block, terms=terms, steps=steps, transpose=transpose),
            out_type=jax.ShapeDtypeStruct((tile.splits, 2, R, M), jnp.float32),
            scratch_types=_scratch(tile, interpret),
            grid=(R // tile.r, M // tile.m, tile.splits),
            grid_names=("r", "m", "s"),
            num_threads=tile.warpgroups + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(
                lowering_semantics=plgpu.LoweringSemantics.Warpgroup
            ),
            interpret=interpret,
        )(x0, x1, words, s0, s1)

    return program


def _scratch(tile, interpret):
    """The interpreter's wgmma reads both operands from memory: a place for the left one."""
    shape = (tile.warpgroups, WGMMA_ROWS, PART)
    return {"left": plgpu.SMEM(shape, jnp.bfloat16)} if interpret else {}


def _swizzled(width):
    """Tiles of `width` 16-bit columns, in the order that wgmma reads without bank conflicts."""
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width)


def _body(x0, x1, words, s0, s1, y, *, left=None, tile, block, terms, steps, transpose):
    r, m, s = lax.axis_index("r"), lax.axis_index("m"), lax.axis_index("s")
    half = block // 2
    part = PART if transpose else min(half, PART)

    def of_weight(k):
        return (r, s * steps + k) if transpose else (s * steps + k, r)

    shape = (tile.r, DEPTH) if transpose else (DEPTH, tile.r)
    x_spec = plgpu.BlockSpec(
        (tile.m, DEPTH), lambda k: (m, s * steps + k), transforms=_swizzled(part)
    )
    scale_spec = plgpu.BlockSpec((shape[0] // half, shape[1]), of_weight)
    word_spec = plgpu.BlockSpec(
        shape, of_weight, transforms=_swizzled(part if transpose else WGMMA_ROWS)
    )

    def accumulate(run):
        accumulator = plgpu.ACC((WGMMA_ROWS, tile.m), jnp.float32)

        @partial(pl.run_scoped, even=accumulator, odd=accumulator)
        def _(even, odd):
            run((even, odd))
            start = r * tile.r + lax.axis_index("warpgroup") * WGMMA_ROWS
            for parity, acc in enumerate((even, odd)):
                at = pl.ds(start, WGMMA_ROWS), pl.ds(m * tile.m, tile.m)
                y.at[s, parity, *at][...] = acc[...]

    step = _backward_step if transpose else _forward_step
    plgpu.emit_pipeline_warp_specialized(
        partial(step, half=half, part=part, multiply=partial(_multiply, terms=terms, left=left)),
        grid=(steps,),
        in_specs=[x_spec, x_spec, word_spec, scale_spec, scale_spec],
        memory_registers=40,
        max_concurrent_steps=min(STAGES, steps),
        wg_axis="warpgroup",
        num_compute_wgs=tile.warpgroups,
        compute_context=accumulate,
    )(x0, x1, words, s0, s1)


def _forward_step(_, x0, x1, words, s0, s1, accs, *, half, part, multiply):
    """Adds one step of `W.T @ x.T`: rows are columns of `W`, and the words are read transposed."""
    rows = pl.ds(lax.axis_index("warpgroup") * WGMMA_ROWS, WGMMA_ROWS)
    for start in range(0, DEPTH, part):
        at = pl.ds(start, part)
        word = words.at[at, rows].transpose((1, 0))[...].astype(jnp.int32)
        for column, (scale, acc) in enumerate(zip((s0, s1), accs, strict=True)):
            scale = lax.broadcast_in_dim(scale[start // half, rows], (WGMMA_ROWS, part), (0,))
            for row, x in enumerate((x0, x1)):
                multiply(acc, _decode(word, row, column) * scale, x.at[:, at].transpose((1, 0)))
    return accs


def _backward_step(_, dy0, dy1, words, s0, s1, accs, *, half, part, multiply):
    """Adds one step of `W @ dy.T`: rows are rows of `W`, as they lie."""
    start = lax.axis_index("warpgroup") * WGMMA_ROWS
    for offset in range(0, DEPTH, part):
        at = pl.ds(offset, part)
        word = words[pl.ds(start, WGMMA_ROWS), at].astype(jnp.int32)
        for column, (scale, dy) in enumerate(((s0, dy0), (s1, dy1))):
            scale = _over_blocks(scale, start // half, at, half)
            for row, acc in enumerate(accs):
                multiply(acc, _decode(word, row, column) * scale, dy.at[:, at].transpose((1, 0)))
    return accs


def _over_blocks(scale, first, at, half):
    """Each of `WGMMA_ROWS` rows gets the row of `scale` of its block, the first of them `first`."""
    shape = (WGMMA_ROWS, at.size)
    whole = lax.broadcast_in_dim(scale[first, at], shape, (1,))
    for start in range(half, WGMMA_ROWS, half):
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0)
        here = lax.broadcast_in_dim(scale[first + start // half, at], shape, (1,))
        whole = jnp.where(row >= start, here, whole)
    return whole


def _decode(word, row, column):
    """The codebook's values for one corner of each word's patch: a tree of selects over its bits."""
    low_bit = 8 * column + 4 * (1 - row)
    values = [jnp.float32(value) for value in CODEBOOK]
    for bit in range(low_bit, low_bit + 4):
        odd = (word & (1 << bit)) != 0
        values = [jnp.where(odd, *values[i : i + 2][::-1]) for i in range(0, len(values), 2)]
    return values[0]


def _multiply(acc, w, x, *, terms, left):
    """`acc += w @ x`, with `w` in registers, and in memory for the interpreter."""
    for term in _terms(w, terms):
        if left is None:
            plgpu.wgmma(acc, term, x)
            plgpu.wgmma_wait(0)
        else:
            place = left.at[lax.axis_index("warpgroup"), :, pl.ds(0, term.shape[1])]
            place[...] = term
            plgpu.commit_smem()
            plgpu.wgmma(acc, place, x)
            plgpu.wgmma_wait(0)
