"""Weights in blocks of codes: NF4 of QLoRA, and the formats that its paper compares it with."""

from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.kernels.lookup import look_up
from lora_jax.kernels.nf4_matmul import nf4_matmul
from lora_jax.quant import codebooks, storage
from lora_jax.quant.double import DoubleQuantized, decode_double
from lora_jax.quant.encode import decode, unpack
from lora_jax.quant.quantized import Quantized
from lora_jax.schema import leaf, static
from lora_jax.weights import vary


@flax.struct.dataclass(repr=False, kw_only=True)
class Blockwise(Quantized):
    """`w[i, o] = codebook[code[i, o]] * absmax[i // block, o]`.

    Attributes:
      codes: a byte of two codes is that of bitsandbytes for the matrix `[d_out, d_in]`,
        transposed.
      absmax: float32 `[stack..., d_in / block, d_out]`, or `DoubleQuantized`.

    Source: Dettmers et al. 2023, arXiv:2305.14314, sections 2 and 3.
    """

    absmax: jax.Array | DoubleQuantized = leaf("stack in out", trained=False)

    block_sizes = tuple(2**power for power in range(3, 13))
    default_block_size = 64
    doubled = "absmax"
    codebook: ClassVar[np.ndarray]

    @classmethod
    def encoded(cls, matrix: np.ndarray, *, block_size: int) -> dict[str, np.ndarray]:
        return storage.store(matrix, cls.codebook, block_size=block_size)

    @classmethod
    def encoded_shapes(
        cls, shape: tuple[int, ...], *, block_size: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        return storage.stored_shapes(shape, cls.codebook, block_size=block_size)

    @property
    def codes_per_byte(self) -> int:
        return storage.codes_per_byte(self.codebook)

    @property
    def block_size(self) -> int:
        return self.codes.shape[-2] * self.codes_per_byte // self.absmax.shape[-2]

    def embed(self, tokens: jax.Array) -> jax.Array:
        codes = self.codes_of(tokens)
        absmax = jnp.take(self.absmax_values(), tokens // self.block_size, axis=0)
        return (look_up(self.codebook, codes) * absmax).astype(self.dtype)

    def absmax_values(self) -> jax.Array:
        """float32 `[stack..., d_in / block, d_out]`."""
        return self.absmax.decode() if isinstance(self.absmax, DoubleQuantized) else self.absmax

    def decode(self, dtype: Any) -> jax.Array:
        *stack, rows, columns = self.codes.shape
        codes = self.unpacked()
        absmax = self.absmax_values()[..., None, :]
        values = look_up(self.codebook, codes).reshape(*absmax.shape[:-2], -1, columns)
        values = values * jnp.broadcast_to(absmax, values.shape)
        return values.astype(dtype).reshape(*stack, rows * self.codes_per_byte, columns)

    def decoded_on_host(self) -> np.ndarray:
        codes: Any = self.codes
        absmax: Any = self.absmax
        if self.codes_per_byte == 2:
            codes = unpack(codes)
        if isinstance(absmax, DoubleQuantized):
            doubly: Any = absmax
            absmax = decode_double(doubly.codes, doubly.scale, doubly.offset)
        return decode(codes, absmax, self.codebook, block_size=self.block_size)


@flax.struct.dataclass(repr=False, kw_only=True)
class NF4(Blockwise):
    """Four bits whose values are quantiles of the normal distribution: the format of QLoRA."""

    format: str = static("nf4")
    codebook: ClassVar[np.ndarray] = codebooks.NF4

    def matmul(self, x: jax.Array) -> jax.Array:
        if x.dtype not in (jnp.bfloat16, jnp.float32):  # the dtypes of the kernels
            return super().matmul(x)
        return nf4_matmul(x, self.codes, self.absmax_values())

    def matmul_transposed(self, x: jax.Array) -> jax.Array:
        """The backward pass of the kernel; its forward pass is not needed here."""
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            return super().matmul_transposed(x)
        unused = jnp.zeros((*x.shape[:-1], 2 * self.codes.shape[0]), x.dtype)
        _, backward = jax.vjp(self.matmul, vary(unused, like=x))
        return backward(x)[0]


@flax.struct.dataclass(repr=False, kw_only=True)
class FP4(Blockwise):
    """Four bits as a floating-point number: the FP4 of bitsandbytes."""

    format: str = static("fp4")
    codebook: ClassVar[np.ndarray] = codebooks.FP4


@flax.struct.dataclass(repr=False, kw_only=True)
class E2M1(Blockwise):
    """Four bits as a floating-point number, the FP4 of the QLoRA paper's tables."""

    format: str = static("e2m1")
    codebook: ClassVar[np.ndarray] = codebooks.E2M1


@flax.struct.dataclass(repr=False, kw_only=True)
class Int4(Blockwise):
    """Four bits in even steps."""

    format: str = static("int4")
    codebook: ClassVar[np.ndarray] = codebooks.INT4


@flax.struct.dataclass(repr=False, kw_only=True)
class Int8(Blockwise):
    """Eight bits in even steps, one code a byte."""

    format: str = static("int8")
    codebook: ClassVar[np.ndarray] = codebooks.INT8
