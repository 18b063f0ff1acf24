"""Weights in blocks of codes: NF4 of QLoRA, and the formats that its paper compares it with.

Dimensions: I rows of the matrix (d_in), O columns (d_out), L stacked layers.
"""

import dataclasses
import math
from typing import Any, ClassVar, Self, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lora_jax import schema
from lora_jax.kernels.lookup import look_up
from lora_jax.kernels.nf4_matmul import nf4_matmul
from lora_jax.layouts import Layout
from lora_jax.quant import codebooks, storage
from lora_jax.quant.double import DoubleQuantized
from lora_jax.schema import leaf, static
from lora_jax.weights import Transposed, Weight, vary


@flax.struct.dataclass(repr=False)
class Blockwise(Weight):
    """`w[i, o] = codebook[code[i, o]] * absmax[i // block, o]`, decoded in float32 and cast last.

    Stored as the matrix `[stack..., d_in, d_out]` that its layout makes of it; a scan over layers
    slices every leaf.

    Attributes:
      codes: uint8 `[stack..., d_in / codes_per_byte, d_out]`. A byte of two holds the even row in
        its high half: bitsandbytes' bytes of the matrix `[d_out, d_in]`, transposed.
      absmax: float32 `[stack..., d_in / block, d_out]`, or `DoubleQuantized`.
      contracted, output: the dimensions that an activation is contracted with, and gains.
      dense_dtype: the dtype of the weight that this stands for.
      layout: where these dimensions are among the logical axes.
      format: its name. JAX tells tree structures apart by the fields of a dataclass, not by its
        type, so that without it `jit` could take one format's program for another's.

    Source: Dettmers et al. 2023, arXiv:2305.14314, sections 2 and 3.
    """

    codes: jax.Array = leaf("stack in out", trained=False)
    absmax: jax.Array | DoubleQuantized = leaf("stack in out", trained=False)
    contracted: tuple[int, ...] = static()
    output: tuple[int, ...] = static()
    dense_dtype: Any = static()
    layout: Layout = static(Layout())
    format: str = static("")

    own_axes = ("nested",)
    split_axes = ("in", "out")
    codebook: ClassVar[np.ndarray]

    @classmethod
    def of(cls, weight: Any, *, layout: Layout, block_size: int, double_quant: bool) -> Self:
        """Quantises a floating-point array whose `d_in` is a multiple of the block size, on the
        host; under a transformation, by a callback to it."""
        _, contracted, output = layout.split(weight.shape)
        matrix = weight if layout == Layout() else layout.to_matrix(weight)
        how: Any = {"block_size": block_size, "double_quant": double_quant}

        def on_host(matrix):
            return storage.store(np.asarray(matrix), cls.codebook, **how)

        if isinstance(matrix, jax.core.Tracer):
            shapes = storage.stored_shapes(matrix.shape, cls.codebook, **how)
            results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
            codes, *absmax = jax.pure_callback(on_host, results, matrix)
        else:
            codes, *absmax = map(jnp.asarray, on_host(matrix))
        return cls(
            codes=codes,
            absmax=DoubleQuantized(*absmax) if double_quant else absmax[0],
            contracted=contracted,
            output=output,
            layout=layout,
            dense_dtype=np.dtype(weight.dtype),
        )

    def requantized(self, dense: jax.Array) -> Self:
        doubly = isinstance(self.absmax, DoubleQuantized)
        made = type(self).of(
            dense, layout=self.layout, block_size=self.block_size, double_quant=doubly
        )
        return dataclasses.replace(cast(Any, made), dense_dtype=self.dense_dtype)

    @property
    def codes_per_byte(self) -> int:
        return storage.codes_per_byte(self.codebook)

    @property
    def block_size(self) -> int:
        """How many rows of the matrix share an absmax."""
        return self.codes.shape[-2] * self.codes_per_byte // self.absmax.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, rows, columns = self.codes.shape
        contracted = _of_shard(self.contracted, rows * self.codes_per_byte)
        return self.layout.joined(tuple(stack), contracted, _of_shard(self.output, columns))

    @property
    def dtype(self) -> Any:
        return self.dense_dtype

    @property
    def nbytes(self) -> int:
        """The bytes that all leaves take."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def __repr__(self) -> str:
        doubly = ", absmax in 8 bits" if isinstance(self.absmax, DoubleQuantized) else ""
        bits = 8 * self.nbytes / math.prod(self.shape)
        return (
            f"{type(self).__name__}({'x'.join(map(str, self.shape))} {np.dtype(self.dtype).name}, "
            f"blocks of {self.block_size}{doubly}, {bits:.3f} bits a parameter)"
        )

    def linear(self, x: jax.Array) -> jax.Array:
        return _matmul(vary(x, like=self.codes), self)

    def linear_transposed(self, x: jax.Array) -> jax.Array:
        return _matmul_transposed(vary(x, like=self.codes), self)

    def embed(self, tokens: jax.Array) -> jax.Array:
        byte, place = tokens // self.codes_per_byte, tokens % self.codes_per_byte
        codes = jnp.take(self.codes, byte, axis=0)
        if self.codes_per_byte == 2:
            is_even = jnp.broadcast_to((place == 0)[..., None], codes.shape)
            codes = jnp.where(is_even, codes >> 4, codes & 15)
        absmax = jnp.take(self.absmax_values(), tokens // self.block_size, axis=0)
        return (look_up(self.codebook, codes) * absmax).astype(self.dtype)

    def dense(self) -> jax.Array:
        return self.layout.from_matrix(self.decode(self.dtype), self.shape)

    def dense_float32(self) -> jax.Array:
        return self.layout.from_matrix(self.decode(jnp.float32), self.shape)

    def dense_on_host(self) -> jax.Array:
        """`dense` with denormal numbers kept, which XLA on a CPU flushes; traced, just `dense`."""
        leaves = jax.tree.leaves(self)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return self.dense()
        stored = [np.asarray(leaf) for leaf in leaves]
        matrix = storage.read(stored, self.codebook, block_size=self.block_size, dtype=self.dtype)
        return self.layout.from_matrix(jnp.asarray(matrix), self.shape)

    @property
    def T(self) -> Transposed:  # noqa: N802
        return Transposed(self)

    def as_matrix(self, layout: Layout) -> Self:
        if layout != self.layout:
            raise ValueError(
                f"{type(self).__name__} was quantised as {self.layout}, and is asked for as "
                f"{layout}. Quantise it with that layout: quantize(..., layouts={{path: layout}})."
            )
        return dataclasses.replace(
            cast(Any, self),
            contracted=(math.prod(self.contracted),),
            output=(math.prod(self.output),),
            layout=Layout(),
        )

    def partition(self, spec: PartitionSpec) -> Self:
        if isinstance(self.absmax, DoubleQuantized) and any(spec[-2:]):
            raise ValueError(
                f"{type(self).__name__} with double quantisation cannot be split by {spec}: blocks "
                "of its absmax run through the whole matrix. Quantise with double_quant=False, or "
                "split stacked layers alone."
            )
        return cast(Self, super().partition(spec))

    def placement(self, spec: PartitionSpec) -> Self:
        """Stored as a matrix, which is sharded along the first axis of each side."""
        stack, *sides = self.layout.split(tuple(spec))
        if any(entry for side in sides for entry in side[1:]):
            raise ValueError(
                f"{spec} splits a dimension that is not the first on its side of the matrix, and "
                "blocks of a quantised weight follow the matrix. Split the first one."
            )
        return schema.specs(self, stack, *(side[:1] for side in sides))

    def absmax_values(self) -> jax.Array:
        """float32 `[stack..., d_in / block, d_out]`."""
        return self.absmax.decode() if isinstance(self.absmax, DoubleQuantized) else self.absmax

    def decode(self, dtype: Any) -> jax.Array:
        """The matrix `[stack..., d_in, d_out]`."""
        *stack, rows, columns = self.codes.shape
        codes = self.codes
        if self.codes_per_byte == 2:
            codes = jnp.stack([codes >> 4, codes & 15], axis=-2)
        absmax = self.absmax_values()[..., None, :]
        values = look_up(self.codebook, codes).reshape(*absmax.shape[:-2], -1, columns)
        values = values * jnp.broadcast_to(absmax, values.shape)
        return values.astype(dtype).reshape(*stack, rows * self.codes_per_byte, columns)

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x @ W` of one matrix, for `linear`, which sees to the gradient."""
        return jnp.matmul(x, self.decode(x.dtype))

    def matmul_transposed(self, x: jax.Array) -> jax.Array:
        """`x @ W.T`, likewise."""
        return jax.lax.dot_general(x, self.decode(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))


def _of_shard(dims: tuple[int, ...], size: int) -> tuple[int, ...]:
    """`dims` with the first as `size` has it, which in one device's block may be less."""
    return (size // math.prod(dims[1:]), *dims[1:])


# For the backward pass both keep the stored bytes alone, and decode them again.
@jax.custom_vjp
def _matmul(x: jax.Array, weight: Blockwise) -> jax.Array:
    return weight.matmul(x)


@jax.custom_vjp
def _matmul_transposed(x: jax.Array, weight: Blockwise) -> jax.Array:
    return weight.matmul_transposed(x)


_matmul.defvjp(
    lambda x, weight: (_matmul(x, weight), weight),
    lambda weight, dy: (_matmul_transposed(dy, weight), None),
)
_matmul_transposed.defvjp(
    lambda x, weight: (_matmul_transposed(x, weight), weight),
    lambda weight, dy: (_matmul(dy, weight), None),
)


@flax.struct.dataclass(repr=False)
class NF4(Blockwise):
    """Four bits whose values are quantiles of the normal distribution: the format of QLoRA."""

    format: str = static("nf4")
    codebook: ClassVar[np.ndarray] = codebooks.NF4

    def matmul(self, x: jax.Array) -> jax.Array:
        if x.dtype not in (jnp.bfloat16, jnp.float32):  # all that the kernels take
            return super().matmul(x)
        return nf4_matmul(x, self.codes, self.absmax_values())

    def matmul_transposed(self, x: jax.Array) -> jax.Array:
        """The backward pass of the kernel, whose forward pass nothing needs here."""
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            return super().matmul_transposed(x)
        unused = jnp.zeros((*x.shape[:-1], 2 * self.codes.shape[0]), x.dtype)
        _, backward = jax.vjp(self.matmul, vary(unused, like=x))
        return backward(x)[0]


@flax.struct.dataclass(repr=False)
class FP4(Blockwise):
    """Four bits as a floating-point number, the way bitsandbytes does it."""

    format: str = static("fp4")
    codebook: ClassVar[np.ndarray] = codebooks.FP4


@flax.struct.dataclass(repr=False)
class E2M1(Blockwise):
    """Four bits as a floating-point number, the FP4 of the QLoRA paper's tables."""

    format: str = static("e2m1")
    codebook: ClassVar[np.ndarray] = codebooks.E2M1


@flax.struct.dataclass(repr=False)
class Int4(Blockwise):
    """Four bits in even steps."""

    format: str = static("int4")
    codebook: ClassVar[np.ndarray] = codebooks.INT4


@flax.struct.dataclass(repr=False)
class Int8(Blockwise):
    """Eight bits in even steps, one code a byte."""

    format: str = static("int8")
    codebook: ClassVar[np.ndarray] = codebooks.INT8


FORMATS: dict[str, type[Blockwise]] = {kind.format: kind for kind in (NF4, FP4, E2M1, Int4, Int8)}
