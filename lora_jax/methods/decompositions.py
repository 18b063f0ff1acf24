"""Low-rank factors of the weight itself, for adapters that are initialised from it."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lora_jax.weights import Weight, dense_float32

INITS = re.compile(r"pissa(?:_niter_(\d+))?|olora")


def factors_of(
    init: str, weight: jax.Array | Weight, rank: int, scale: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`a [stack..., d_in, r]` and `b [stack..., r, d_out]`, float32, of `weight [stack..., d_in,
    d_out]`, so that `scale * a @ b` is a part of it:

    - "pissa": the r leading singular triplets, `a = U sqrt(S / scale)`, `b = sqrt(S / scale) V^T`
      (Meng et al. 2024, arXiv:2404.02948, section 3).
    - "pissa_niter_N": the same by N rounds of subspace iteration from a random subspace (Halko et
    al.
      2011, arXiv:0909.4061, algorithm 4.4): close, and much faster where r is small.
    - "olora": of `w^T = Q R`, the leading rows of R and columns of Q (Buyukakyuz 2024,
      arXiv:2406.01775); the scale is not divided out, as in the paper and in PEFT.

    Layers are decoded and decomposed one after another.
    """
    found = INITS.fullmatch(init)
    assert found, init

    def split(matrix, scale, key):
        if init == "olora":
            q, _ = jnp.linalg.qr(matrix[:rank].T)  # of w^T's first columns: all that counts
            with jax.default_matmul_precision("highest"):
                return matrix @ q, q.T
        if found[1]:
            return _rooted(*subspace_svd(matrix, rank, int(found[1]), key), scale)
        return _rooted(*truncated_svd(matrix, rank), scale)

    return each_layer(split, weight, scale, key)


def truncated_svd(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The leading singular triplets of `[..., d_in, d_out]`: U, S, V^T."""
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return u[..., :rank], s[..., :rank], vt[..., :rank, :]


def subspace_svd(
    matrix: jax.Array, rank: int, rounds: int, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """About the leading singular triplets of `[d_in, d_out]`, from a random subspace."""
    with jax.default_matmul_precision("highest"):
        q = matrix @ jax.random.normal(key, (matrix.shape[1], rank), matrix.dtype)
        q, _ = jnp.linalg.qr(q)
        for _ in range(rounds):
            q, _ = jnp.linalg.qr(matrix.T @ q)
            q, _ = jnp.linalg.qr(matrix @ q)
        u, s, vt = jnp.linalg.svd(q.T @ matrix, full_matrices=False)
        return q @ u, s, vt


def each_layer(function: Callable, weight: jax.Array | Weight, *arguments: jax.Array):
    """`function(matrix, *arguments)` of each stacked layer, float32, one after another.

    On a CPU, jaxlib's LAPACK distributes a batch of matrices over the threads that run the program
    and waits: where every thread is in such a call, it waits for ever (seen with jaxlib 0.10.2, two
    cores and seven weights). So a decomposition never gets a batch.
    """
    if weight.ndim > 2:
        return jax.lax.map(lambda one: each_layer(function, one[0], *one[1:]), (weight, *arguments))
    return function(dense_float32(weight), *arguments)


def _rooted(u, s, vt, scale):
    root = jnp.sqrt(s / jnp.where(scale == 0, 1, scale))
    return u * root[None], root[:, None] * vt
