"""Random NF4 weights, and their matmul in float64 numpy."""

import ml_dtypes
import numpy as np

from lora_jax.kernels.nf4_matmul.reference import CODEBOOK

BFLOAT16 = ml_dtypes.bfloat16


def weight(K: int, N: int, block: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Packed codes `[K / 2, N]` and absmax `[K / block, N]`."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (K // 2, N)).astype(np.uint8)
    return codes, rng.uniform(0.01, 0.1, (K // block, N)).astype(np.float32)


def activation(*shape: int, dtype, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def dense(codes: np.ndarray, absmax: np.ndarray, dtype) -> np.ndarray:
    """The decoded weight, rounded once to `dtype`, as float64 `[K, N]`."""
    K = 2 * len(codes)
    unpacked = np.empty((K, codes.shape[1]), np.uint8)
    unpacked[0::2], unpacked[1::2] = codes >> 4, codes & 0xF
    product = CODEBOOK[unpacked] * np.repeat(absmax, K // len(absmax), axis=0)
    return product.astype(dtype).astype(np.float64)


def assert_is_product(y, x, w) -> None:
    """`y = x @ w`, up to float32 accumulation and one rounding to the dtype of `y`.

    `x` and `w` are exact; the bound is that of a float32 sum in any order, with one unit of the
    last place of `y` for its own rounding.
    """
    y = np.asarray(y)
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], w.shape[1])
    x = x.astype(np.float64)
    exact, size = x @ w, np.abs(x) @ np.abs(w)
    last_place = {4: 2.0**-24, 2: 2.0**-8}[y.dtype.itemsize]
    error = np.abs(y.astype(np.float64) - exact)
    bound = last_place * np.abs(exact) + len(w) * 2.0**-24 * size
    assert (error <= bound).all(), (error / bound).max()
