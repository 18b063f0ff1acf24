"""Random problems of `grouped_lora`, and their answers in float64 numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

BFLOAT16 = ml_dtypes.bfloat16


@dataclasses.dataclass(frozen=True)
class Problem:
    x: np.ndarray
    a: np.ndarray
    b: np.ndarray
    pages: np.ndarray
    sizes: np.ndarray

    def arrays(self):
        return [jnp.asarray(array) for array in dataclasses.astuple(self)]


def problem(
    sizes, *, dtype, rest=0, d_in=24, d_out=40, w=3, pages=7, ranks=8, page_dtype=None, seed=0
) -> Problem:
    """Segments of `sizes` tokens, `rest` more behind them, and pages in any order; the first
    segment has none, and page 0, which no segment names, holds no numbers."""
    rng = np.random.default_rng(seed)
    shape = len(sizes), w
    named = rng.permuted(np.tile(np.arange(1, pages), (len(sizes), 1)), axis=1)[:, :w]
    named = np.where(rng.random(shape) < 0.3, -1, named).astype(np.int32)
    named[0] = -1
    page_dtype = page_dtype or dtype
    a, b = (
        (rng.standard_normal((pages, ranks, d)) / np.sqrt(d)).astype(page_dtype)
        for d in (d_in, d_out)
    )
    a[0] = b[0] = np.nan
    x = rng.standard_normal((sum(sizes) + rest, d_in)).astype(dtype)
    return Problem(x, a, b, named, np.array(sizes, np.int32))


def exact(p: Problem, dy: np.ndarray | None = None):
    """`y`, or the gradients of x, a and b."""
    x, a, b = (array.astype(np.float64) for array in (p.x, p.a, p.b))
    y = np.zeros((len(x), b.shape[2]))
    dx, da, db = np.zeros_like(x), np.zeros_like(a), np.zeros_like(b)
    dy = np.zeros_like(y) if dy is None else dy.astype(np.float64)
    ends = np.cumsum(p.sizes)
    for s, end in enumerate(ends):
        rows = slice(end - p.sizes[s], end)
        for page in p.pages[s][p.pages[s] >= 0]:
            h, dh = x[rows] @ a[page].T, dy[rows] @ b[page].T
            y[rows] += h @ b[page]
            dx[rows] += dh @ a[page]
            da[page] += dh.T @ x[rows]
            db[page] += h.T @ dy[rows]
    return y, dx, da, db


def assert_near(actual, expected, *, computed=None):
    """Up to sums in float32; where bfloat16 is the input's dtype, which the result's is unless
    `computed` says otherwise, up to one rounding on the way and one at the end."""
    actual = np.asarray(actual)
    shortest = min(np.dtype(computed or actual.dtype).itemsize, actual.dtype.itemsize)
    tolerance = {4: 2e-6, 2: 2e-2}[shortest]
    assert actual.shape == expected.shape
    size = max(np.abs(expected).max(initial=0), 1)
    np.testing.assert_allclose(
        actual.astype(np.float64), expected, rtol=tolerance, atol=tolerance * size
    )


def value_and_gradients(f, p: Problem, dy):
    x, a, b, pages, sizes = p.arrays()
    y, vjp = jax.vjp(lambda x, a, b: f(x, a, b, pages, sizes), x, a, b)
    return y, *vjp(jnp.asarray(dy))


def cotangent(p: Problem, seed=9):
    shape = len(p.x), p.b.shape[2]
    return np.random.default_rng(seed).standard_normal(shape).astype(p.x.dtype)
