"""The arrays that a quantised stack of matrices is stored as, made and read on the host."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

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
    return [(codes, np.uint8), *_doubly_shapes(stack, *blocks[-2:])]


def store(
    matrix: np.ndarray, codebook: np.ndarray, *, block_size: int, double_quant: bool
) -> list[np.ndarray]:
    """Codes and absmax of `matrix [stack..., d_in, d_out]`, or codes and the absmax's own codes,
    scales and offsets.

    Raises:
      ValueError: if the matrix holds NaN or infinity.
    """
    codes, absmax = store_singly(matrix, codebook, block_size=block_size)
    return [codes, *store_doubly(absmax)] if double_quant else [codes, absmax]


def store_singly(
    matrix: np.ndarray, codebook: np.ndarray, *, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and absmax; those of whole blocks need nothing of the rest of the matrix."""

    def one(layer):
        codes, absmax = encode(layer, codebook, block_size=block_size)
        return pack(codes) if codes_per_byte(codebook) == 2 else codes, absmax

    shapes = stored_shapes(matrix.shape, codebook, block_size=block_size, double_quant=False)
    codes, absmax = _layer_by_layer(one, matrix, shapes)
    return codes, absmax


def store_doubly(absmax: np.ndarray) -> list[np.ndarray]:
    """The codes, scales and offsets of `absmax [stack..., blocks, d_out]`, whole layers of it."""
    *stack, blocks, columns = absmax.shape
    return _layer_by_layer(double_quantize, absmax, _doubly_shapes(stack, blocks, columns))


def _doubly_shapes(stack: Sequence[int], blocks: int, columns: int) -> Shapes:
    nested = -(-blocks * columns // NESTED_BLOCK)
    return [
        ((*stack, blocks, columns), np.uint8),
        ((*stack, nested), np.float32),
        ((*stack,), np.float32),
    ]


def _layer_by_layer(
    work: Callable[[np.ndarray], Iterable[Any]], matrix: np.ndarray, shapes: Shapes
) -> list[np.ndarray]:
    arrays: list[np.ndarray] = [np.empty(shape, dtype) for shape, dtype in shapes]
    for layer in np.ndindex(matrix.shape[:-2]):
        for array, part in zip(arrays, work(matrix[layer]), strict=True):
            array[layer] = part
    return arrays


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
