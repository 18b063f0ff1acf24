"""The arrays that a quantised stack of matrices is stored as, made on the host layer by layer."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.quant.double import NESTED_BLOCK, double_quantize
from lora_jax.quant.encode import encode, pack


def codes_per_byte(codebook: np.ndarray) -> int:
    return 2 if len(codebook) == 16 else 1


def stored_shapes(
    shape: tuple[int, ...], codebook: np.ndarray, *, block_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of what `store` returns for a matrix of `shape`."""
    *stack, rows, columns = shape
    return {
        "codes": jax.ShapeDtypeStruct(
            (*stack, rows // codes_per_byte(codebook), columns), np.uint8
        ),
        "absmax": jax.ShapeDtypeStruct((*stack, rows // block_size, columns), np.float32),
    }


def store(matrix: np.ndarray, codebook: np.ndarray, *, block_size: int) -> dict[str, np.ndarray]:
    """Codes and absmax of `matrix [stack..., d_in, d_out]`; those of full blocks need nothing of
    the rest of the matrix.

    Raises:
      ValueError: if the matrix holds NaN or infinity.
    """

    def one(layer):
        codes, absmax = encode(layer, codebook, block_size=block_size)
        return pack(codes) if codes_per_byte(codebook) == 2 else codes, absmax

    shapes = stored_shapes(matrix.shape, codebook, block_size=block_size)
    return layer_by_layer(one, matrix, shapes)


def layer_by_layer(
    work: Callable[[np.ndarray], Iterable[Any]],
    matrix: np.ndarray,
    shapes: dict[str, jax.ShapeDtypeStruct],
) -> dict[str, np.ndarray]:
    """The arrays that `work` returns for each layer, stacked."""
    arrays = {name: np.empty(made.shape, made.dtype) for name, made in shapes.items()}
    for layer in np.ndindex(matrix.shape[:-2]):
        for array, part in zip(arrays.values(), work(matrix[layer]), strict=True):
            array[layer] = part
    return arrays


def store_doubly(absmax: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of `DoubleQuantized`, for complete layers of `absmax [stack..., blocks,
    d_out]`."""
    return layer_by_layer(double_quantize, absmax, doubly_shapes(absmax.shape))


def doubly_shapes(shape: Sequence[int]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of what `store_doubly` returns for an absmax of `shape`."""
    *stack, blocks, columns = shape
    nested = -(-blocks * columns // NESTED_BLOCK)
    return {
        "codes": jax.ShapeDtypeStruct((*stack, blocks, columns), np.uint8),
        "scale": jax.ShapeDtypeStruct((*stack, nested), np.float32),
        "offset": jax.ShapeDtypeStruct((*stack,), np.float32),
    }
