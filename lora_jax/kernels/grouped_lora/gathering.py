"""Grouped LoRA in plain XLA: blocks of tokens of one segment, each beside a copy of its pages.

FLOPs and bytes grow with the tokens and the pages that segments name, not with those of the bank.
Blocks are as long as segments are on average, and end where a segment ends: what is padded is at
most one block a segment. Where every token is a segment, a block is one token and nothing is
padded; segments of one known length are one block each.

`lax.ragged_dot` is the other way to write it, with a group for every page. For an H100 (compiled
with jax 0.12.0.1) and for a CPU XLA makes it a dense product: a copy of all tokens for every group,
masked, 138 MB for 256 bfloat16 tokens of 4096 and 64 pages. Gathering for 8 tokens and 2 pages each
compiles for the H100 into fusions that read the pages where they are, with 2 KB beside.

Dimension key: N tokens, D = d_in, O = d_out, P pages, W pages of a segment, r ranks of a page,
R = W r, S segments, G blocks, M tokens of a block.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

MOST_TOKENS = 64  # of a block


def grouped(
    x_ND: jax.Array,
    a_PrD: jax.Array,
    b_PrO: jax.Array,
    pages_SW: jax.Array,
    sizes_S: jax.Array | None,
) -> jax.Array:
    """`y [N, O]` in the dtype of `x`; sizes None are S equal ones."""
    to_blocks, from_blocks, pages_GW = _blocks(len(x_ND), pages_SW, sizes_S)
    x_GMD = to_blocks(x_ND)
    h_GMR = _narrow(x_GMD, gathered(a_PrD, pages_GW))
    b_GRO = gathered(b_PrO, pages_GW).astype(x_ND.dtype)
    return from_blocks(_product("gmr,gro->gmo", h_GMR, b_GRO).astype(x_ND.dtype))


def factor_gradients(
    x_ND: jax.Array,
    dy_NO: jax.Array,
    a_PrD: jax.Array,
    b_PrO: jax.Array,
    pages_SW: jax.Array,
    sizes_S: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The gradients of all pages: those that no segment names get zeros."""
    to_blocks, _, pages_GW = _blocks(len(x_ND), pages_SW, sizes_S)
    x_GMD, dy_GMO = to_blocks(x_ND), to_blocks(dy_NO)
    h_GMR = _narrow(x_GMD, gathered(a_PrD, pages_GW))
    dh_GMR = _narrow(dy_GMO, gathered(b_PrO, pages_GW))
    da_GRD = _product("gmr,gmd->grd", dh_GMR, x_GMD)
    db_GRO = _product("gmr,gmo->gro", h_GMR, dy_GMO)
    return _summed(da_GRD, a_PrD, pages_GW), _summed(db_GRO, b_PrO, pages_GW)


def gathered(factor_PrD: jax.Array, pages_GW: jax.Array) -> jax.Array:
    """The pages of each block side by side, `[G, W r, D]`; zeros where there is none."""
    factor_PrD, pages_GW = where_it_is(factor_PrD, pages_GW)
    pages = _beyond(pages_GW, len(factor_PrD))
    found = factor_PrD.at[pages].get(mode="fill", fill_value=0)
    return found.reshape(len(pages), -1, factor_PrD.shape[-1])


def where_it_is(bank: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same two, so that XLA for a CPU gathers from the bank and not from a copy.

    XLA (jax 0.10.2) gathers bfloat16 as float32, and moves the conversion of the full bank out of
    the loop over layers, unless the bank depends on what the loop changes.
    """
    return (
        jax.lax.optimization_barrier((bank, index)) if bank.dtype != jnp.float32 else (bank, index)
    )


def _summed(parts_GRD: jax.Array, like_PrD: jax.Array, pages_GW: jax.Array) -> jax.Array:
    P, r, D = like_PrD.shape
    parts = parts_GRD.reshape(*pages_GW.shape, r, D)
    total = jnp.zeros(like_PrD.shape, jnp.float32)
    return total.at[_beyond(pages_GW, P)].add(parts, mode="drop").astype(like_PrD.dtype)


def _beyond(pages: jax.Array, count: int) -> jax.Array:
    """Pages with -1 as an index beyond the last: as it is, it would be the last page's."""
    return jnp.where(pages < 0, count, pages)


def _narrow(x_GMD: jax.Array, a_GRD: jax.Array) -> jax.Array:
    return _product("gmd,grd->gmr", x_GMD, a_GRD.astype(x_GMD.dtype)).astype(x_GMD.dtype)


def _product(formula: str, one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.einsum(
        formula,
        one,
        other,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def segment_of(places: jax.Array, ends: jax.Array) -> jax.Array:
    """The segment that each place is in, S behind the last, for the ends of S segments."""
    return jnp.searchsorted(ends, places, side="right", method="compare_all")


def block_size(tokens: int, segments: int) -> int:
    """Tokens of a block: a power of two, about as many as a segment has on average."""
    return min(1 << max(tokens // segments, 1).bit_length() - 1, MOST_TOKENS)


def _blocks(
    N: int, pages_SW: jax.Array, sizes_S: jax.Array | None
) -> tuple[Callable, Callable, jax.Array]:
    """How arrays `[N, ...]` become `[G, M, ...]` and back, and the pages of each block."""
    S = len(pages_SW)
    if sizes_S is None:
        return (
            lambda x: x.reshape(S, -1, x.shape[-1]),
            lambda y: y.reshape(N, y.shape[-1]),
            pages_SW,
        )
    M = block_size(N, S)
    token_N = jnp.arange(N, dtype=jnp.int32)
    ends_S = jnp.cumsum(sizes_S, dtype=jnp.int32)
    segment_N = segment_of(token_N, ends_S)
    if M == 1:
        pages_NW = pages_SW.at[segment_N].get(mode="fill", fill_value=-1)
        return lambda x: x[:, None], lambda y: y[:, 0], pages_NW

    G = N // M + S
    last_S = jnp.cumsum(-(-sizes_S // M), dtype=jnp.int32)  # one behind a segment's last block
    first_S = last_S - -(-sizes_S // M)
    in_segment_N = token_N - (ends_S - sizes_S).at[segment_N].get(mode="clip")
    place_N = first_S.at[segment_N].get(mode="clip") * M + in_segment_N
    place_N = jnp.where(segment_N < S, place_N, G * M)
    segment_G = segment_of(jnp.arange(G, dtype=jnp.int32), last_S)
    pages_GW = pages_SW.at[segment_G].get(mode="fill", fill_value=-1)

    def to_blocks(x):
        padded = jnp.zeros((G * M, x.shape[-1]), x.dtype)
        return padded.at[place_N].set(x, mode="drop", unique_indices=False).reshape(G, M, -1)

    def from_blocks(y):
        flat = y.reshape(G * M, y.shape[-1])
        return flat.at[place_N].get(mode="fill", fill_value=0)

    return to_blocks, from_blocks, pages_GW
