"""NF4 matmul on a TPU: bytes are decoded in VMEM while the MXU multiplies what is decoded.

Two rows of `W` share a byte just as two rows of a bfloat16 register share its 32-bit words: packing
the decode of both halves into one word puts the rows in order at no cost. The codebook, repeated
along the 128 lanes of a register, is read by a gather along lanes; the compiler's schedule for it
is two thirds as long as for a tree of selects.

Dimension key: M rows, K = d_in, N = d_out, H = K / 2 bytes, B = blocks along K; lower case for a
tile of each. A step of either kernel decodes `h` bytes by `STRIP` columns.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lora_jax.kernels.nf4_matmul.reference import CODEBOOK

LANES = 128
STRIP = 256
VMEM_LIMIT = 24 * 2**20

# The most rows and columns of an output tile, by generation. Decoding a tile takes the vector unit
# 4 to 5 cycles for 1,024 weights, multiplying it by m rows takes a v5's MXUs m / 64 and a v6's
# m / 128: these hide the first behind the second, and need less of HBM than it delivers.
TILES = {"TPU v6": (1024, 1024), "TPU7": (1024, 1024)}
DEFAULT_TILE = (512, 512)


@dataclasses.dataclass(frozen=True)
class Tiles:
    m: int
    n: int
    k: int
    h: int


def tiles(M: int, K: int, N: int, block: int, device_kind: str) -> Tiles | None:
    """The tiles for one product, in either direction; None for shapes that the kernel lacks."""
    if K % 64 or block % 16:
        return None
    most_m, most_n = next((t for kind, t in TILES.items() if kind in device_kind), DEFAULT_TILE)
    few_rows = M <= 128
    ks = [k for k in (2048 if few_rows else 512, 512, 256) if K % k == 0 and k % block == 0]
    if not ks and K > 2048:
        return None
    k = ks[0] if ks else K
    hs = [h for h in (128, 64, 256) if k % (2 * h) == 0 and (2 * h) % block == 0]
    n = min(512 if few_rows else most_n, pl.cdiv(N, STRIP) * STRIP)
    return Tiles(m=min(M, most_m), n=n, k=k, h=hs[0] if hs else k // 2)


def matmul(
    x: jax.Array,
    codes: jax.Array,
    absmax: jax.Array,
    *,
    transpose: bool,
    device_kind: str,
    interpret: Any = False,
) -> jax.Array:
    """`x [M, K] @ W`, or `x [M, N] @ W.T`, for shapes that `tiles` has tiles for."""
    M = x.shape[0]
    (H, N), B = codes.shape, absmax.shape[0]
    K = 2 * H
    tile = tiles(M, K, N, K // B, device_kind)
    assert tile, "checked by the dispatch"
    (width, depth), (wide, deep) = (N, K), (tile.n, tile.k)
    if transpose:
        width, depth, wide, deep = depth, width, deep, wide

    def of_weight(m, i, j):
        return (i, j) if transpose else (j, i)

    chunks = tile.k // (2 * tile.h)
    return pl.pallas_call(
        partial(_transposed if transpose else _plain, h=tile.h, N=N),
        out_shape=jax.ShapeDtypeStruct(
            (M, width), x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type
        ),
        grid=(pl.cdiv(M, tile.m), pl.cdiv(width, wide), pl.cdiv(depth, deep)),
        in_specs=[
            pl.BlockSpec((tile.m, deep), lambda m, i, j: (m, j)),
            pl.BlockSpec((tile.k // 2, tile.n), of_weight),
            pl.BlockSpec(
                (chunks, B * 2 * tile.h // K, tile.n),
                lambda *at: (of_weight(*at)[0], 0, of_weight(*at)[1]),
            ),
            pl.BlockSpec((1, LANES), lambda m, i, j: (0, 0)),
        ],
        out_specs=pl.BlockSpec((tile.m, wide), lambda m, i, j: (m, i)),
        scratch_shapes=[pltpu.VMEM((tile.m, wide), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        interpret=interpret,
        name="nf4_matmul_transposed" if transpose else "nf4_matmul",
    )(
        x,
        codes,
        absmax.reshape(K // (2 * tile.h), -1, N),
        jnp.tile(jnp.asarray(CODEBOOK), LANES // len(CODEBOOK))[None],
    )


def _plain(x_ref, codes_ref, absmax_ref, table_ref, y_ref, acc_ref, *, h, N):
    """A tile of `y [m, n] = x [m, k] @ W [k, n]`, summed over the last axis of the grid."""
    _zero_at_first(acc_ref)

    def strip(j):
        cols = pl.ds(j * STRIP, STRIP)
        for c in range(absmax_ref.shape[0]):
            w = _decode(
                codes_ref[c * h : (c + 1) * h, cols], absmax_ref[c, :, cols], table_ref, x_ref.dtype
            )
            acc_ref[:, cols] += _dot(x_ref[:, 2 * c * h : 2 * (c + 1) * h], w, 0)

    _loop(codes_ref.shape[1] // STRIP, strip)
    _store_at_last(acc_ref, y_ref)


def _transposed(dy_ref, codes_ref, absmax_ref, table_ref, dx_ref, acc_ref, *, h, N):
    """A tile of `dx [m, k] = dy [m, n] @ W [k, n].T`, summed over the last axis of the grid."""
    _zero_at_first(acc_ref)
    n = codes_ref.shape[1]

    def chunk(c):
        for j in range(n // STRIP):
            cols = pl.ds(j * STRIP, STRIP)
            dy, absmax = dy_ref[:, cols], absmax_ref[c, :, cols]
            if N % n:  # values beyond the last column are not zero
                valid = pl.program_id(2) * n + j * STRIP + _iota(1, (1, STRIP)) < N
                dy, absmax = jnp.where(valid, dy, 0), jnp.where(valid, absmax, 0.0)
            w = _decode(codes_ref[pl.ds(c * h, h), cols], absmax, table_ref, dy.dtype)
            acc_ref[:, pl.ds(2 * c * h, 2 * h)] += _dot(dy, w, 1)

    _loop(absmax_ref.shape[0], chunk)
    _store_at_last(acc_ref, dx_ref)


def _decode(codes, absmax, table_ref, dtype):
    """`W [2 h, n]` of bytes `[h, n]` and absmax `[b, n]`."""
    h, n = codes.shape
    words = jax.lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.int32)
    table = jnp.broadcast_to(table_ref[...], (h, LANES))
    scale = jnp.broadcast_to(absmax[:, None], (len(absmax), h // len(absmax), n)).reshape(h, n)

    def values(index):
        registers = [
            jnp.take_along_axis(table, index[:, i : i + LANES], axis=1, mode="promise_in_bounds")
            for i in range(0, n, LANES)
        ]
        return jnp.concatenate(registers, axis=1) * scale

    high, low = values((words >> 4) & 15), values(words & 15)
    if dtype == jnp.bfloat16:

        def bits(w):
            return jax.lax.bitcast_convert_type(w.astype(jnp.bfloat16), jnp.uint16).astype(
                jnp.uint32
            )

        return pltpu.bitcast((bits(low) << 16) | bits(high), jnp.bfloat16)
    return jnp.stack([high, low], axis=1).reshape(2 * h, n)


def _dot(x, w, contracted):
    return jax.lax.dot_general(
        x,
        w,
        (((1,), (contracted,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _iota(axis, shape):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _loop(count, body):
    """One body is written out, with static indices; more share a loop."""
    if count == 1:
        body(0)
    else:
        jax.lax.fori_loop(0, count, lambda i, _: body(i), None)


def _zero_at_first(acc_ref):
    @pl.when(pl.program_id(2) == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)


def _store_at_last(acc_ref, out_ref):
    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = acc_ref[...].astype(out_ref.dtype)
