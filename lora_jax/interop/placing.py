"""Leaves in a file, and how each is placed as soon as it is read."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.quant import quantizer

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredLeaf:
    """A leaf of the params tree in a file; `read` reads all or a part of it.

    Attributes:
      shape: in the tree: stacked over layers, applied from the right.
      dtype: to which it is read.
      tensors: opens the file's tensor of each layer (of a leaf without layers, the only one): an
        array, or an object that returns one when it is indexed by slices.
      is_stacked: whether the first axis counts layers.
      is_transposed: whether the file holds (out, in).
      on_read: called with the number of bytes read, after each tensor.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    tensors: Sequence[Callable[[], Any]]
    is_stacked: bool
    is_transposed: bool
    on_read: Callable[[int], None] = lambda count: None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, index: Index | None = None) -> np.ndarray:
        """The leaf, or its part at `index` (one slice an axis, without steps)."""
        index = index or (slice(None),) * len(self.shape)
        ranges = [range(*s.indices(size)) for s, size in zip(index, self.shape, strict=True)]
        layers, rest = (ranges[0], ranges[1:]) if self.is_stacked else (range(1), ranges)
        at = [slice(axis.start, axis.stop) for axis in rest]
        part = np.empty((len(layers), *map(len, rest)), self.dtype)
        for row, layer in zip(part, layers, strict=True):
            tensor = self.tensors[layer]()[tuple(at[::-1] if self.is_transposed else at)]
            row[...] = tensor.T if self.is_transposed else tensor
            self.on_read(row.nbytes)
        return part if self.is_stacked else part[0]


Place = Callable[[str, StoredLeaf], Any]


def on_device(path: str, leaf: StoredLeaf) -> jax.Array:
    """The full leaf on the default device."""
    return jnp.asarray(leaf.read())


def shapes_alone(path: str, leaf: StoredLeaf) -> jax.ShapeDtypeStruct:
    """The leaf's shape and dtype; nothing of it is read."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def quantized(format: str, **options: Any) -> Place:
    """Places each leaf as `quantize(params, format, **options)` returns it."""
    finish = quantizer(format, **options)
    return lambda path, leaf: finish(path, leaf.read())


def sharded(sharding: Callable[[str, StoredLeaf], jax.sharding.Sharding]) -> Place:
    """Places each leaf by the sharding of its path and shape; a process reads only what its devices
    hold. `parallel.quantized_in_parts` quantises them as well."""

    def place(path: str, leaf: StoredLeaf) -> jax.Array:
        parts: dict[str, np.ndarray] = {}

        def part(index: Index | None) -> np.ndarray:  # of replicas, the first reads
            if str(index) not in parts:
                parts[str(index)] = leaf.read(index)
            return parts[str(index)]

        return jax.make_array_from_callback(
            leaf.shape, sharding(path, leaf), part, dtype=leaf.dtype
        )

    return place
