"""From numbers to codes, on the host.

Numpy's arithmetic is IEEE's on every machine; accelerators may round a division otherwise, and XLA
on a CPU flushes denormal numbers to zero. So the codes are the same on every platform, and equal to
those of bitsandbytes' CPU build bit for bit.
"""

import numpy as np

_CHUNK = 1 << 18  # entries encoded at a time, which a core's cache holds
_SMALLEST = np.float32(1e-38)  # stands in for a smaller absmax where it is divided by


def encode(
    matrix: np.ndarray, codebook: np.ndarray, *, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest codes, after each block of rows is divided by its largest magnitude.

    `code = argmin_c |codebook[c] - x / absmax|`; a tie goes to the smaller value.

    Args:
      matrix: `[d_in, d_out]`, of any float dtype, finite. Blocks run along `d_in`.
      codebook: `[2^bits]` float32.
      block_size: rows that share an absmax; the last block of a column may be shorter.

    Returns:
      codes `[d_in, d_out]` uint8, and absmax `[ceil(d_in / block_size), d_out]` float32.

    Raises:
      ValueError: for NaN or infinity.
    """
    rows, columns = matrix.shape
    codes = np.empty((rows, columns), np.uint8)
    absmax = np.empty((-(-rows // block_size), columns), np.float32)
    full = rows - rows % block_size  # rows of full blocks
    step = max(1, _CHUNK // (block_size * max(columns, 1))) * block_size
    for start in range(0, full, step):
        chunk = slice(start, min(start + step, full))
        blocks = matrix[chunk].astype(np.float32).reshape(-1, block_size, columns)
        largest = _finite(np.abs(blocks).max(axis=1, initial=0))
        blocks *= (np.float32(1) / np.maximum(largest, _SMALLEST))[:, None]
        absmax[start // block_size :][: len(largest)] = largest
        codes[chunk] = nearest(blocks, codebook).reshape(-1, columns)
    if full < rows:  # bitsandbytes divides here, and keeps the clamped absmax
        tail = matrix[full:].astype(np.float32)
        absmax[-1] = np.maximum(_finite(np.abs(tail).max(axis=0)), _SMALLEST)
        codes[full:] = nearest(tail / absmax[-1], codebook)
    return codes, absmax


def _finite(largest: np.ndarray) -> np.ndarray:
    if not np.isfinite(largest).all():
        raise ValueError("it holds NaN or infinity, which no block can scale.")
    return largest


def nearest(x: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """The index of the nearest value of the codebook; on a midpoint, of the smaller value."""
    order = np.argsort(codebook, kind="stable").astype(np.uint8)
    values = codebook[order]
    midpoints = (values[:-1] + values[1:]) / np.float32(2)
    if len(codebook) > 16:
        return order[np.searchsorted(midpoints, x)]
    place = np.zeros(x.shape, np.uint8)  # a few comparisons beat a search in numpy
    for midpoint in midpoints:
        place += x > midpoint
    return order[place]


def pack(codes: np.ndarray) -> np.ndarray:
    """4-bit codes `[2n, d_out]` as bytes `[n, d_out]`, the even row in the high half."""
    return (codes[::2] << 4) | codes[1::2]


def unpack(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack`."""
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1, packed.shape[1])


def decode(
    codes: np.ndarray, absmax: np.ndarray, codebook: np.ndarray, *, block_size: int
) -> np.ndarray:
    """`codebook[code] * absmax`, float32, denormal results included."""
    return codebook[codes] * np.repeat(absmax, block_size, axis=0)[: len(codes)]
