"""The definition: every token multiplies its own pages.

Dimension key: N tokens, D = d_in, O = d_out, P pages, W pages of a segment, R ranks of a page,
S segments.
"""

import jax
import jax.numpy as jnp


def grouped(
    x_ND: jax.Array,
    a_PRD: jax.Array,
    b_PRO: jax.Array,
    pages_SW: jax.Array,
    sizes_S: jax.Array,
) -> jax.Array:
    """`y[n] = sum_j (x[n] @ a[page_j].T) @ b[page_j]`, in float32 and rounded once."""
    with jax.default_matmul_precision("highest"):
        segment_N = jnp.repeat(
            jnp.arange(len(sizes_S)), sizes_S, total_repeat_length=len(x_ND)
        )  # beyond the last token of a segment: the last one again
        page_NW = jnp.where(
            (jnp.arange(len(x_ND)) < sizes_S.sum())[:, None], pages_SW[segment_N], -1
        )
        known_NW11 = (page_NW >= 0)[..., None, None]
        a_NWRD = jnp.where(known_NW11, a_PRD[page_NW], 0).astype(jnp.float32)
        b_NWRO = jnp.where(known_NW11, b_PRO[page_NW], 0).astype(jnp.float32)
        h_NWR = jnp.einsum("nd,nwrd->nwr", x_ND.astype(jnp.float32), a_NWRD)
        return jnp.einsum("nwr,nwro->no", h_NWR, b_NWRO).astype(x_ND.dtype)
