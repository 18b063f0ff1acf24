"""MXFP4: four-bit floating-point numbers under a power of two for each 32 of them.

Source: OCP Microscaling Formats (MX) Specification, version 1.0, sections 5 and 6.
"""

import itertools
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from lora_jax.kernels.lookup import look_up
from lora_jax.quant import storage
from lora_jax.quant.encode import pack, unpack
from lora_jax.quant.quantized import Quantized
from lora_jax.schema import leaf, static

BLOCK = 32
_BIAS = 127  # of a scale, E8M0: a byte e is 2^(e - 127)
_NAN = 255
_LARGEST_EXPONENT = 2  # of an element, E2M1: 6 is 1.5 * 2^2
_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_ELEMENTS = np.concatenate([_MAGNITUDES, -_MAGNITUDES])  # by code: a sign, two bits, one bit


@flax.struct.dataclass(repr=False, kw_only=True)
class MXFP4(Quantized):
    """`w[i, o] = element[code[i, o]] * 2^(scale[i // 32, o] - 127)`: 4.25 bits a parameter.

    Every product is a float32 and a bfloat16 number, so that decoding is exact. In blocks near the
    ends of float32's range, XLA may flush denormal values, and 6 * 2^127 is infinite.

    Attributes:
      scales: uint8 `[stack..., d_in / 32, d_out]`; 255 makes its block NaN.
    """

    scales: jax.Array = leaf("stack in out", trained=False)
    format: str = static("mxfp4")

    block_sizes = (BLOCK,)
    default_block_size = BLOCK
    codes_per_byte = 2
    block_size = BLOCK

    @classmethod
    def from_blocks(
        cls, blocks: ArrayLike, scales: ArrayLike, *, dtype: DTypeLike = jnp.bfloat16
    ) -> Self:
        """The weight `[stack..., d_in, d_out]` that a checkpoint of gpt-oss holds by output rows.

        Args:
          blocks: uint8 `[stack..., d_out, d_in / 32, 16]`, the even element in a byte's low half.
          scales: uint8 `[stack..., d_out, d_in / 32]`.
          dtype: of the weight that this stands for.

        Raises:
          ValueError: for other shapes or dtypes.
        """
        blocks, scales = jnp.asarray(blocks), jnp.asarray(scales)
        fits = blocks.shape == (*scales.shape, BLOCK // 2) and scales.ndim >= 2
        if not fits or not blocks.dtype == scales.dtype == jnp.uint8:
            raise ValueError(
                f"blocks are {blocks.dtype}{list(blocks.shape)} and scales "
                f"{scales.dtype}{list(scales.shape)}: expected uint8 [..., d_out, d_in / 32, 16] "
                "and uint8 [..., d_out, d_in / 32]."
            )
        *_, d_out, count = scales.shape
        rows = blocks.reshape(*scales.shape[:-1], count * BLOCK // 2)
        rows = (rows << 4) | (rows >> 4)  # codes here have the even row in the high half
        return cls(
            codes=jnp.swapaxes(rows, -1, -2),
            scales=jnp.swapaxes(scales, -1, -2),
            contracted=(count * BLOCK,),
            output=(d_out,),
            dense_dtype=jnp.dtype(dtype),
        )

    @classmethod
    def encoded(cls, matrix: np.ndarray, *, block_size: int) -> dict[str, np.ndarray]:
        shapes = cls.encoded_shapes(matrix.shape, block_size=block_size)
        return storage.layer_by_layer(_encode, matrix, shapes)

    @classmethod
    def encoded_shapes(
        cls, shape: tuple[int, ...], *, block_size: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        *stack, rows, columns = shape
        return {
            "codes": jax.ShapeDtypeStruct((*stack, rows // 2, columns), np.uint8),
            "scales": jax.ShapeDtypeStruct((*stack, rows // block_size, columns), np.uint8),
        }

    def decode(self, dtype: Any) -> jax.Array:
        *stack, blocks, columns = self.scales.shape
        codes = self.unpacked().reshape(*stack, blocks, BLOCK, columns)
        values = _scaled(codes, self.scales[..., None, :]).astype(dtype)
        return values.reshape(*stack, blocks * BLOCK, columns)

    def embed(self, tokens: jax.Array) -> jax.Array:
        scales = jnp.take(self.scales, tokens // BLOCK, axis=0)
        return _scaled(self.codes_of(tokens), scales).astype(self.dtype)

    def decoded_on_host(self) -> np.ndarray:
        elements: Any = _ELEMENTS[unpack(np.asarray(self.codes))]
        scales = np.repeat(np.asarray(self.scales), BLOCK, axis=0)
        with np.errstate(over="ignore"):
            values = np.ldexp(elements, scales.astype(np.int32) - _BIAS)
        return np.where(scales == _NAN, np.float32(np.nan), values)


def _encode(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and scales of `[d_in, d_out]`, by section 6.3: the scale is the largest power of two in
    a block over that of an element; elements are rounded to nearest, ties to even, and clamped."""
    blocks = matrix.astype(np.float32).reshape(-1, BLOCK, matrix.shape[1])
    largest = np.abs(blocks).max(axis=1)
    if not np.isfinite(largest).all():
        raise ValueError("it holds NaN or infinity, which no block can scale.")
    exponents = np.frexp(largest)[1] - 1 - _LARGEST_EXPONENT
    exponents = np.where(largest > 0, np.maximum(exponents, -_BIAS), -_BIAS)
    scaled = np.abs(np.ldexp(blocks, -exponents[:, None]))
    codes = np.signbit(blocks).astype(np.uint8) << 3
    for code, (below, above) in enumerate(itertools.pairwise(_MAGNITUDES)):
        midpoint = (below + above) / 2
        codes += scaled >= midpoint if code % 2 else scaled > midpoint
    return pack(codes.reshape(matrix.shape)), (exponents + _BIAS).astype(np.uint8)


def _scaled(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """The values in float32. A scale is two factors, for 2^-127 alone would be flushed to zero."""
    exponents = scales.astype(jnp.int32) - _BIAS
    half = exponents >> 1
    near = jnp.where(scales == _NAN, jnp.float32(jnp.nan), _power_of_two(half))
    far = _power_of_two(exponents - half)
    values = look_up(_ELEMENTS, codes)
    values = values * jnp.broadcast_to(near, values.shape)
    return values * jnp.broadcast_to(far, values.shape)


def _power_of_two(exponents: jax.Array) -> jax.Array:
    """Of exponents of normal float32 numbers, by their bits."""
    return jax.lax.bitcast_convert_type((exponents + 127) << 23, jnp.float32)
