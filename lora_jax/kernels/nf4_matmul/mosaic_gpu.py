"""NF4 matmul on Hopper, through Pallas' Mosaic GPU backend.

wgmma takes its left operand from registers, so the weight is the left operand and the product is
computed transposed: `y.T = W.T @ x.T`, or `dx.T = W @ dy.T`. A 16-bit word of the packed weight
holds a 2 x 2 patch of `W`: rows `2 h`, `2 h + 1` and columns `2 p`, `2 p + 1`. Decoded, the words
are four left operands of one shape, one for each corner of the patch. Forward, the two corners of a
column share an accumulator, and those of a row a right operand; backward, the other way round. So
nothing is interleaved here: XLA splits `x` and `absmax` into even and odd columns before, and
interleaves the result after, in programs that it can fuse with their neighbours. Where a result has
few tiles, the contraction is split over thread blocks too, and XLA adds the parts.

bfloat16 is multiplied as it is. wgmma would shorten float32 to tf32, so float32 is written as a sum
of three bfloat16 terms on both sides.

Decoding takes 4 to 5 instructions a weight, counted in the machine code for sm_90a, of which one is
a shuffle. A multiprocessor's 128 lanes would then keep up with HBM, 9 bytes for 16 weights.

Dimension key: M rows, D contracted words, R words along the result, H = K / 2, P = N / 2, B blocks,
S parts of the contraction.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from lora_jax.kernels.nf4_matmul.reference import CODEBOOK

WGMMA_ROWS = 64
DEPTH = 64  # words of the contraction in a step of the pipeline
PART = 32  # and in one wgmma: as many as registers hold in float32
MULTIPROCESSORS = 132
STAGES = 4
THREADS = 128  # of a warpgroup
TABLE = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)  # thread i holds entry i


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows `m` of a tile, warpgroups that compute, and parts that the contraction is split into."""

    m: int
    warpgroups: int
    splits: int

    @property
    def r(self) -> int:
        return WGMMA_ROWS * self.warpgroups


def fits(K: int, N: int, block: int) -> bool:
    """Whether the kernel takes a weight, in both directions."""
    return K % 256 == 0 and N % 256 == 0 and block in (32, 64, 128)


def tiles(M: int, K: int, N: int, *, transpose: bool) -> Tiles:
    """The tiles of one product with a weight that `fits`."""
    m = next((m for m in (8, 16, 32, 64) if m >= M), 128)
    warpgroups = 1 if m == 128 else 2  # the accumulators of 128 rows need the registers of two
    R, D = (K // 2, N // 2) if transpose else (N // 2, K // 2)
    blocks, steps = (R // (WGMMA_ROWS * warpgroups)) * pl.cdiv(M, m), D // DEPTH
    fill = [s for s in (16, 8, 4, 2) if steps % s == 0 and blocks * s <= 2 * MULTIPROCESSORS]
    return Tiles(m, warpgroups, next((s for s in fill if steps // s >= STAGES), 1))


def matmul(
    x: jax.Array,
    codes: jax.Array,
    absmax: jax.Array,
    *,
    transpose: bool,
    interpret: Any = None,
) -> jax.Array:
    """`x [M, K] @ W`, or `x [M, N] @ W.T`, for a weight that `fits`."""
    M, (H, N), B = x.shape[0], codes.shape, absmax.shape[0]
    block = 2 * H // B
    terms = 1 if x.dtype == jnp.bfloat16 else 3
    tile = tiles(M * terms, 2 * H, N, transpose=transpose)
    x = jnp.concatenate(_terms(x, terms))
    x = jnp.pad(x, ((0, -len(x) % tile.m), (0, 0)))
    words = lax.bitcast_convert_type(codes.reshape(H, N // 2, 2), jnp.uint16)
    D, R = (N // 2, H) if transpose else (H, N // 2)
    steps = D // DEPTH // tile.splits
    kernel = plgpu.kernel(
        partial(_body, tile=tile, block=block, terms=terms, steps=steps, transpose=transpose),
        out_type=jax.ShapeDtypeStruct((tile.splits, 2, R, len(x)), jnp.float32),
        scratch_types=_scratch(tile, interpret),
        grid=(R // tile.r, len(x) // tile.m, tile.splits),
        grid_names=("r", "m", "s"),
        num_threads=tile.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    table = np.tile(CODEBOOK, THREADS // len(CODEBOOK))
    y_S2RM = kernel(_parities(x), words, _parities(absmax), table)
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
    """The even and the odd columns, `[rows, n]` to `[2, rows, n / 2]`."""
    return x.reshape(len(x), -1, 2).transpose(2, 0, 1)


def _scratch(tile, interpret):
    """The interpreter's wgmma reads both operands from memory: a place for the left one."""
    shape = (tile.warpgroups, WGMMA_ROWS, PART)
    return {"left": plgpu.SMEM(shape, jnp.bfloat16)} if interpret else {}


def _swizzled(width):
    """Tiles of `width` 16-bit columns, in the order that wgmma reads without bank conflicts."""
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width)


def _body(x, words, absmax, table, y, *, left=None, tile, block, terms, steps, transpose):
    r, m, s = lax.axis_index("r"), lax.axis_index("m"), lax.axis_index("s")
    half = block // 2
    part = PART if transpose else min(half, PART)

    def of_weight(k):
        return (r, s * steps + k) if transpose else (s * steps + k, r)

    shape = (tile.r, DEPTH) if transpose else (DEPTH, tile.r)
    x_spec = plgpu.BlockSpec(
        (2, tile.m, DEPTH), lambda k: (0, m, s * steps + k), transforms=_swizzled(part)
    )
    absmax_spec = plgpu.BlockSpec((2, shape[0] // half, shape[1]), lambda k: (0, *of_weight(k)))
    word_spec = plgpu.BlockSpec(
        shape, of_weight, transforms=_swizzled(part if transpose else WGMMA_ROWS)
    )

    def accumulate(run):
        accumulator = plgpu.ACC((WGMMA_ROWS, tile.m), jnp.float32)

        @partial(pl.run_scoped, even=accumulator, odd=accumulator)
        def _(even, odd):
            run((even, odd, plgpu.layout_cast(table[...], TABLE)))
            start = r * tile.r + lax.axis_index("warpgroup") * WGMMA_ROWS
            for parity, acc in enumerate((even, odd)):
                at = pl.ds(start, WGMMA_ROWS), pl.ds(m * tile.m, tile.m)
                y.at[s, parity, *at][...] = acc[...]

    step = _backward_step if transpose else _forward_step
    plgpu.emit_pipeline_warp_specialized(
        partial(
            step,
            half=half,
            part=part,
            decode=partial(_decode, interpret=left is not None),
            multiply=partial(_multiply, terms=terms, left=left),
        ),
        grid=(steps,),
        in_specs=[x_spec, word_spec, absmax_spec],
        memory_registers=40,
        max_concurrent_steps=min(STAGES, steps),
        wg_axis="warpgroup",
        num_compute_wgs=tile.warpgroups,
        compute_context=accumulate,
    )(x, words, absmax)


def _forward_step(_, x, words, absmax, carry, *, half, part, decode, multiply):
    """Adds one step of `W.T @ x.T`: rows are columns of `W`, and the words are read transposed."""
    *accs, table = carry
    rows = pl.ds(lax.axis_index("warpgroup") * WGMMA_ROWS, WGMMA_ROWS)
    for start in range(0, DEPTH, part):
        at = pl.ds(start, part)
        word = words.at[at, rows].transpose((1, 0))[...].astype(jnp.int32)
        for column, acc in enumerate(accs):
            scale = absmax[column, start // half, rows]
            scale = lax.broadcast_in_dim(scale, (WGMMA_ROWS, part), (0,))
            for row in range(2):
                multiply(acc, decode(table, word, row, column) * scale, x.at[row, :, at])
    return carry


def _backward_step(_, dy, words, absmax, carry, *, half, part, decode, multiply):
    """Adds one step of `W @ dy.T`: rows are rows of `W`, as stored."""
    *accs, table = carry
    start = lax.axis_index("warpgroup") * WGMMA_ROWS
    for offset in range(0, DEPTH, part):
        at = pl.ds(offset, part)
        word = words[pl.ds(start, WGMMA_ROWS), at].astype(jnp.int32)
        for column in range(2):
            scale = _over_blocks(absmax.at[column], start // half, at, half)
            for row, acc in enumerate(accs):
                multiply(acc, decode(table, word, row, column) * scale, dy.at[column, :, at])
    return carry


def _over_blocks(scale, first, at, half):
    """Each of `WGMMA_ROWS` rows gets the row of `scale` of its block, the first of them `first`."""
    shape = (WGMMA_ROWS, at.size)
    found = lax.broadcast_in_dim(scale[first, at], shape, (1,))
    for start in range(half, WGMMA_ROWS, half):
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0)
        here = lax.broadcast_in_dim(scale[first + start // half, at], shape, (1,))
        found = jnp.where(row >= start, here, found)
    return found


def _decode(table, word, row, column, *, interpret):
    """The codebook's values for one corner of each word's patch.

    Each thread holds one entry of the codebook, so that looking one up is a shuffle within a warp:
    `table[index % 32]`. The interpreter, which has no warps, indexes.
    """
    index = word >> (8 * column + 4 * (1 - row))
    if interpret:
        return table[index % 32]
    layout = plgpu.Layout.WGMMA
    values = plgpu.ShapeDtypeStruct(word.shape, jnp.float32, layout=layout)
    return plgpu.inline_mgpu(arg_types=(TABLE, layout), return_type=values)(_shuffle)(table, index)


def _shuffle(_, table, index):
    """Reads the entries that the low five bits of each index name from other threads' registers."""
    (entry,) = table.registers.flat
    entry = _element(entry, 0)
    out = np.empty_like(index.registers)
    for at, register in np.ndenumerate(index.registers):
        (length,) = ir.VectorType(register.type).shape
        values = [
            llvm.inline_asm(
                entry.type,
                [entry, _element(register, i)],
                "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;",
                "=f,f,r",
                has_side_effects=True,
            )
            for i in range(length)
        ]
        out[at] = vector.from_elements(ir.VectorType.get((length,), entry.type), values)
    return mgpu.FragmentedArray(_registers=out, _layout=index.layout, _is_signed=None)


def _element(register, i):
    return vector.extract(register, dynamic_position=[], static_position=[i])


def _multiply(acc, w, x, *, terms, left):
    """`acc += w @ x.T`, with `w` in registers, or in memory for the interpreter."""
    for term in _terms(w, terms):
        if left is not None:
            place = left.at[lax.axis_index("warpgroup"), :, pl.ds(0, term.shape[1])]
            place[...] = term
            plgpu.commit_smem()
            term = place
        plgpu.wgmma(acc, term, x.transpose((1, 0)))
        plgpu.wgmma_wait(0)
