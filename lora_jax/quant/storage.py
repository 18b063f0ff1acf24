"""The arrays that a quantised stack of matrices is stored as, made and read on the host."""

import numpy as np

from lora_jax.quant.double import NESTED_BLOCK, decode_double, double_quantize
from lora_jax.quant.encode import decode, encode, pack, unpack

Shapes = list[tuple[tuple[int, ...], type[np.generic]]]


def codes_per_byte(codebook: np.ndarray) -> int:
    return 2 if len(codebook) == 16 else 1


def stored_shapes(
    shape: tuple[int, ...], codebook: np.ndarray, *, block_size: int, double_quant: bool
) -> Shapes:
    """Shape and dtype of what `store` returns for a matrix of `shape`."""
    *stack, rows, columns = shape
    codes = (*stack, rows // codes_per_byte(codebook), columns)
    blocks = (*stack, rows // block_size, columns)
    if not double_quant:
        return [(codes, np.uint8), (blocks, np.float32)]
    nested = (*stack, -(-blocks[-2] * columns // NESTED_BLOCK))
    return [(codes, np.uint8), (blocks, np.uint8), (nested, np.float32), ((*stack,), np.float32)]


def store(
    matrix: np.ndarray, codebook: np.ndarray, *, block_size: int, double_quant: bool
) -> list[np.ndarray]:
    """Codes and absmax of `matrix [stack..., d_in, d_out]`, or codes and the absmax's own codes,
    scales and offsets, filled layer by layer.

    Raises:
      ValueError: if the matrix holds NaN or infinity.
    """
    shapes = stored_shapes(matrix.shape, codebook, block_size=block_size, double_quant=double_quant)
    stored: list[np.ndarray] = [np.empty(shape, dtype) for shape, dtype in shapes]
    for layer in np.ndindex(matrix.shape[:-2]):
        codes, absmax = encode(matrix[layer], codebook, block_size=block_size)
        packed = pack(codes) if codes_per_byte(codebook) == 2 else codes
        parts = double_quantize(absmax) if double_quant else (absmax,)
        for array, part in zip(stored, (packed, *parts), strict=True):
            array[layer] = part
    return stored


def read(stored: list[np.ndarray], codebook: np.ndarray, *, block_size: int, dtype) -> np.ndarray:
    """The matrix `[stack..., d_in, d_out]` that `store` made `stored` of."""
    packed, *absmax = stored
    *stack, rows, columns = packed.shape
    matrix = np.empty((*stack, rows * codes_per_byte(codebook), columns), dtype)
    for layer in np.ndindex(*stack):
        codes = unpack(packed[layer]) if codes_per_byte(codebook) == 2 else packed[layer]
        parts = [part[layer] for part in absmax]
        scales = parts[0] if len(parts) == 1 else decode_double(*parts)
        matrix[layer] = decode(codes, scales, codebook, block_size=block_size)
    return matrix
