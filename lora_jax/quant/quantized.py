"""What every format of quantised weights shares: products, gradients, layouts, shardings.

A format is a file of its own that subclasses `Quantized`, and a line in `lora_jax.quant.formats`.
Dimensions: I rows of the matrix (d_in), O columns (d_out), L stacked layers.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar, Self, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lora_jax import schema
from lora_jax.layouts import Layout
from lora_jax.quant import frozen, storage
from lora_jax.quant.double import DoubleQuantized
from lora_jax.schema import leaf, static
from lora_jax.weights import Transposed, Weight, vary


@flax.struct.dataclass(repr=False, kw_only=True)
class Quantized(Weight):
    """A frozen weight as codes, and the arrays that its format needs to decode them.

    Stored as the matrix `[stack..., d_in, d_out]` that its layout makes of it; a scan over layers
    slices every leaf. Decoded in float32 and cast last.

    Attributes:
      codes: uint8 `[stack..., d_in / codes_per_byte, d_out]`. A byte of two holds the even row in
        its high half.
      contracted, output: the dimensions that an activation is contracted with, and gains.
      dense_dtype: the dtype of the weight that this stands for.
      layout: where these dimensions are among the logical axes.
      format: its name. JAX tells tree structures apart by the fields of a dataclass, not by its
        type, so that without it `jit` could take one format's program for another's.

    A subclass declares its other arrays, each `[stack..., rows of its own, d_out]`, and gives:

      block_sizes, default_block_size: how many rows of the matrix may be quantised together.
      doubled: the name of the float32 array that double quantisation keeps in 8 bits, if any.
      codes_per_byte: 1 or 2.
      encoded, encoded_shapes: its arrays, of a matrix.
      decode, decoded_on_host, embed: the matrix, by XLA and by numpy, and rows of it.
    """

    codes: jax.Array = leaf("stack in out", trained=False)
    contracted: tuple[int, ...] = static()
    output: tuple[int, ...] = static()
    dense_dtype: Any = static()
    layout: Layout = static(Layout())
    format: str = static("")

    own_axes = ("nested",)
    split_axes = ("in", "out")
    block_sizes: ClassVar[tuple[int, ...]]
    default_block_size: ClassVar[int]
    doubled: ClassVar[str | None] = None

    @property
    @abc.abstractmethod
    def codes_per_byte(self) -> int: ...

    @property
    @abc.abstractmethod
    def block_size(self) -> int:
        """How many rows of the matrix are quantised together."""

    @classmethod
    @abc.abstractmethod
    def encoded(cls, matrix: np.ndarray, *, block_size: int) -> dict[str, np.ndarray]:
        """Its arrays by name, for `matrix [stack..., d_in, d_out]`; those of full blocks need
        nothing of the rest. Raises ValueError for NaN or infinity."""

    @classmethod
    @abc.abstractmethod
    def encoded_shapes(
        cls, shape: tuple[int, ...], *, block_size: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """What `encoded` returns for a matrix of `shape`."""

    @abc.abstractmethod
    def decode(self, dtype: Any) -> jax.Array:
        """The matrix `[stack..., d_in, d_out]`."""

    @abc.abstractmethod
    def decoded_on_host(self) -> np.ndarray:
        """One matrix in float32, denormal values included, of arrays that are numpy's."""

    @classmethod
    def options(cls, block_size: int | None, double_quant: bool | None) -> dict[str, Any]:
        """Both options of `of`, the format's own for None.

        Raises:
          ValueError: for a block size or an option that the format does not have.
        """
        block_size = cls.default_block_size if block_size is None else block_size
        double_quant = cls.doubled is not None if double_quant is None else double_quant
        if block_size not in cls.block_sizes:
            sizes = ", ".join(map(str, cls.block_sizes))
            raise ValueError(
                f"block_size={block_size!r}: expected one of {sizes} for {cls.format}."
            )
        if double_quant and cls.doubled is None:
            raise ValueError(
                f"double_quant={double_quant!r}: {cls.format} has no scales in float32 that could "
                "be quantised again. Leave it out."
            )
        return {"block_size": block_size, "double_quant": double_quant}

    @classmethod
    def of(
        cls,
        weight: Any,
        *,
        layout: Layout,
        block_size: int | None = None,
        double_quant: bool | None = None,
    ) -> Self:
        """Quantises a floating-point array whose `d_in` is a multiple of the block size, on the
        host; under a transformation, by a callback to it. Options as in `options`."""
        how = cls.options(block_size, double_quant)
        _, contracted, output = layout.split(weight.shape)
        matrix = weight if layout == Layout() else layout.to_matrix(weight)

        def on_host(matrix):
            return cls._stored(np.asarray(matrix), **how)

        if isinstance(matrix, jax.core.Tracer):
            arrays = jax.pure_callback(on_host, cls._stored_shapes(matrix.shape, **how), matrix)
        else:
            arrays = jax.tree.map(jnp.asarray, on_host(matrix))
        return cls(
            **arrays,
            contracted=contracted,
            output=output,
            layout=layout,
            dense_dtype=np.dtype(weight.dtype),
        )

    @classmethod
    def _stored(cls, matrix: np.ndarray, *, block_size: int, double_quant: bool) -> dict[str, Any]:
        arrays: dict[str, Any] = cls.encoded(matrix, block_size=block_size)
        if double_quant and cls.doubled:
            doubly: Any = storage.store_doubly(arrays[cls.doubled])
            arrays[cls.doubled] = DoubleQuantized(**doubly)
        return arrays

    @classmethod
    def _stored_shapes(
        cls, shape: tuple[int, ...], *, block_size: int, double_quant: bool
    ) -> dict[str, Any]:
        shapes: dict[str, Any] = cls.encoded_shapes(shape, block_size=block_size)
        if double_quant and cls.doubled:
            doubly: Any = storage.doubly_shapes(shapes[cls.doubled].shape)
            shapes[cls.doubled] = DoubleQuantized(**doubly)
        return shapes

    def requantized(self, dense: jax.Array) -> Self:
        made = type(self).of(
            dense,
            layout=self.layout,
            block_size=self.block_size,
            double_quant=self.is_doubly_quantized,
        )
        return dataclasses.replace(cast(Any, made), dense_dtype=self.dense_dtype)

    @property
    def is_doubly_quantized(self) -> bool:
        return self.doubled is not None and isinstance(getattr(self, self.doubled), DoubleQuantized)

    def singly(self) -> Self:
        """The same weight without double quantisation: every array is sharded as the matrix is."""
        if not self.is_doubly_quantized:
            return self
        name = cast(str, self.doubled)
        return dataclasses.replace(cast(Any, self), **{name: getattr(self, name).decode()})

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
        doubly = f", {self.doubled} in 8 bits" if self.is_doubly_quantized else ""
        bits = 8 * self.nbytes / math.prod(self.shape)
        return (
            f"{type(self).__name__}({'x'.join(map(str, self.shape))} {np.dtype(self.dtype).name}, "
            f"blocks of {self.block_size}{doubly}, {bits:.3f} bits a parameter)"
        )

    def linear(self, x: jax.Array) -> jax.Array:
        return frozen.matmul(vary(x, like=self.codes), self)

    def linear_transposed(self, x: jax.Array) -> jax.Array:
        return frozen.matmul_transposed(vary(x, like=self.codes), self)

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x @ W` of one matrix, for `linear`, which defines the gradient."""
        return jnp.matmul(x, self.decode(x.dtype))

    def matmul_transposed(self, x: jax.Array) -> jax.Array:
        """`x @ W.T`, likewise."""
        return jax.lax.dot_general(x, self.decode(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))

    def unpacked(self) -> jax.Array:
        """The codes with an axis for those of one byte, `[stack..., rows, codes_per_byte, d_out]`,
        where two share one."""
        codes = self.codes
        return codes if self.codes_per_byte == 1 else jnp.stack([codes >> 4, codes & 15], axis=-2)

    def codes_of(self, tokens: jax.Array) -> jax.Array:
        """The codes `[..., d_out]` of rows of one matrix."""
        byte, place = tokens // self.codes_per_byte, tokens % self.codes_per_byte
        codes = jnp.take(self.codes, byte, axis=0)
        if self.codes_per_byte == 1:
            return codes
        is_even = jnp.broadcast_to((place == 0)[..., None], codes.shape)
        return jnp.where(is_even, codes >> 4, codes & 15)

    def dense(self) -> jax.Array:
        return self.layout.from_matrix(self.decode(self.dtype), self.shape)

    def dense_float32(self) -> jax.Array:
        return self.layout.from_matrix(self.decode(jnp.float32), self.shape)

    def dense_on_host(self) -> jax.Array:
        """`dense` with denormal numbers kept, which XLA on a CPU flushes; traced, just `dense`."""
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(self)):
            return self.dense()
        stored = jax.tree.map(np.asarray, self)
        *stack, rows, columns = self.codes.shape
        matrix = np.empty((*stack, rows * self.codes_per_byte, columns), self.dtype)
        for layer in np.ndindex(*stack):
            one = jax.tree.map(lambda array, layer=layer: array[layer], stored)
            matrix[layer] = one.decoded_on_host()
        return self.layout.from_matrix(jnp.asarray(matrix), self.shape)

    @property
    def T(self) -> Transposed:  # noqa: N802
        return Transposed(self)

    def as_matrix(self, layout: Layout) -> Self:
        if layout != self.layout:
            raise ValueError(
                f"{type(self).__name__} was quantised as {self.layout}, and cannot be read as "
                f"{layout}. Quantise it with that layout: quantize(..., layouts={{path: layout}})."
            )
        return dataclasses.replace(
            cast(Any, self),
            contracted=(math.prod(self.contracted),),
            output=(math.prod(self.output),),
            layout=Layout(),
        )

    def local_specs(self, spec: PartitionSpec) -> Self:
        if self.is_doubly_quantized and any(spec[-2:]):
            raise ValueError(
                f"{type(self).__name__} with double quantisation cannot be split by {spec}: blocks "
                f"of its {self.doubled} run through the whole matrix. Quantise with "
                "double_quant=False, or split stacked layers alone."
            )
        return cast(Self, super().local_specs(spec))

    def sharding_specs(self, spec: PartitionSpec) -> Self:
        """Stored as a matrix, which is sharded along the first axis of each side."""
        *stack, d_in, d_out = self.matrix_spec(spec)
        return schema.sharding_specs(self, stack, (d_in,), (d_out,))

    def matrix_spec(self, spec: PartitionSpec) -> PartitionSpec:
        """The sharding spec of the stored matrix where a plain array would have `spec`."""
        stack, *sides = self.layout.split_spec(tuple(spec))
        if any(entry for side in sides for entry in side[1:]):
            raise ValueError(
                f"{spec} splits a dimension that is not the first on its side of the matrix, and "
                "blocks of a quantised weight follow the matrix. Split the first one."
            )
        return PartitionSpec(*stack, *(side[0] for side in sides))


def _of_shard(dims: tuple[int, ...], size: int) -> tuple[int, ...]:
    """`dims` with the first as `size` has it, which in one device's block may be less."""
    return (size // math.prod(dims[1:]), *dims[1:])
