"""Singular values and directions of an update and of the weight that it changes; one matrix each.

Everything is float32, at the highest precision of products. Dimensions: I rows (d_in), O columns
(d_out), R factors, K = min(I, O, R) singular values.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

EPS = float(jnp.finfo(jnp.float32).eps)


class Spectrum(NamedTuple):
    """`U diag(s) V^T`, largest first; values that are rounding, and their directions, are zero.

    Attributes:
      u, s, v: the triplets, `[I, K]`, `[K]` and `[O, K]`.
      rank: how many values are not zero, an integer scalar.
    """

    u: jax.Array
    s: jax.Array
    v: jax.Array
    rank: jax.Array


def of_factors(a_IR: jax.Array, b_RO: jax.Array) -> Spectrum:
    """Of `a @ b`, which is not built: QR of both factors, then the SVD of the core `R_a R_b^T`.

    Costs about `4 (I + O) R^2 + 20 R^3` operations. Values below `4 eps sqrt(R)` of the root sum of
    squares of `|a_r| |b_r|` are rounding.
    """
    with jax.default_matmul_precision("highest"):
        q_in, r_in = jnp.linalg.qr(a_IR)
        q_out, r_out = jnp.linalg.qr(b_RO.T)
        u, s, vt = jnp.linalg.svd(r_in @ r_out.T, full_matrices=False)
        u, v = q_in @ u, q_out @ vt.T
    terms = jnp.linalg.norm(a_IR, axis=0) * jnp.linalg.norm(b_RO, axis=1)
    return _above(4 * EPS * a_IR.shape[1] ** 0.5 * jnp.linalg.norm(terms), u, s, v)


def of_matrix(matrix_IO: jax.Array, noise: jax.Array | float = 0.0) -> Spectrum:
    """Of a dense matrix, by a full SVD: about `20 I O min(I, O)` operations.

    Values below `4 eps sqrt(max(I, O))` of the largest, plus `noise`, are rounding.
    """
    u, s, vt = jnp.linalg.svd(matrix_IO, full_matrices=False)
    return _above(4 * EPS * max(matrix_IO.shape) ** 0.5 * s[0] + noise, u, s, vt.T)


def by_gram(matrix_IO: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All singular triplets `u [I, K]`, `s [K]`, `v [O, K]` of a dense weight, from the
    eigenvectors of the smaller of `W W^T` and `W^T W`: half to a tenth of an SVD's time on a CPU.

    A direction of value s is off by about `eps (s_1 / s)^2` over the relative gap to its
    neighbours, where an SVD's is off by `eps s_1 / s`: the leading ones are as good, those below
    `1e-3 s_1` mix with each other. Values are the lengths of `W v`, and as good as an SVD's for the
    same directions. Values that are rounding, and their directions, are zero.
    """
    if matrix_IO.shape[0] > matrix_IO.shape[1]:
        v, s, u = by_gram(matrix_IO.T)
        return u, s, v
    size = jnp.max(jnp.abs(matrix_IO))
    unit_IO = matrix_IO / jnp.where(size == 0, 1, size)
    with jax.default_matmul_precision("highest"):
        _, u_IK = jnp.linalg.eigh(unit_IO @ unit_IO.T)
        u_IK = u_IK[:, ::-1]
        wide_OK = unit_IO.T @ u_IK
    s_K = jnp.linalg.norm(wide_OK, axis=0)
    is_rounding = s_K <= EPS * max(matrix_IO.shape) * jnp.max(s_K)
    v_OK = wide_OK / jnp.where(is_rounding, 1, s_K)[None]
    u_IK, v_OK = (jnp.where(is_rounding[None], 0, side) for side in (u_IK, v_OK))
    return u_IK, jnp.where(is_rounding, 0, s_K * size), v_OK


def largest_value(matrix_IO: jax.Array) -> jax.Array:
    """The spectral norm, from the eigenvalues of the smaller Gram matrix; exact to rounding."""
    narrow = matrix_IO if matrix_IO.shape[0] <= matrix_IO.shape[1] else matrix_IO.T
    size = jnp.max(jnp.abs(narrow))
    unit = narrow / jnp.where(size == 0, 1, size)
    with jax.default_matmul_precision("highest"):
        squares = jnp.linalg.eigvalsh(unit @ unit.T)
    return size * jnp.sqrt(jnp.maximum(squares[-1], 0))


def effective_rank(s_K: jax.Array) -> jax.Array:
    """`exp(-sum p log p)` with `p = s / sum(s)`: between 1 and the rank; 0 of zero."""
    total = jnp.sum(s_K)
    p = s_K / jnp.where(total == 0, 1, total)
    entropy = -jnp.sum(p * jnp.log(jnp.where(p == 0, 1, p)))
    return jnp.where(total == 0, 0, jnp.exp(entropy))


def amplification(update: Spectrum, weight_IO: jax.Array) -> jax.Array:
    """`|dW| / |U^T W V|`; 0 of no update, infinite where the weight has nothing there."""
    with jax.default_matmul_precision("highest"):
        inside = jnp.linalg.norm(update.u.T @ weight_IO @ update.v)
    return jnp.where(update.rank == 0, 0, jnp.linalg.norm(update.s) / inside)


def overlap(one_DK: jax.Array, rank: jax.Array, other_DL: jax.Array, other_rank: jax.Array):
    """`phi [K, L]`: entry (i, j) is `|U_i^T U'_j|^2 / min(i, j)` of the leading i and j directions.

    Past its rank a subspace is all of its update's directions: `min` counts no more than those.
    """
    with jax.default_matmul_precision("highest"):
        squares = (one_DK.T @ other_DL) ** 2
    total = jnp.cumsum(jnp.cumsum(squares, axis=0), axis=1)
    rows = jnp.minimum(jnp.arange(1, squares.shape[0] + 1), rank)
    columns = jnp.minimum(jnp.arange(1, squares.shape[1] + 1), other_rank)
    count = jnp.minimum(rows[:, None], columns[None]).astype(jnp.float32)
    return jnp.where(count == 0, 0, jnp.minimum(total / jnp.maximum(count, 1), 1))


def _above(floor: jax.Array, u: jax.Array, s: jax.Array, v: jax.Array) -> Spectrum:
    # NaN is no rounding: it is kept, and reported.
    is_rounding = s <= floor
    u, v = jnp.where(is_rounding[None], 0, u), jnp.where(is_rounding[None], 0, v)
    return Spectrum(u, jnp.where(is_rounding, 0, s), v, jnp.sum(~is_rounding))
