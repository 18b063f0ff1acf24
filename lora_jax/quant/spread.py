"""A quantised weight over devices, each part made of the rows and columns that it stands for."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from lora_jax.quant import storage
from lora_jax.quant.blockwise import Blockwise
from lora_jax.quant.double import DoubleQuantized


def quantize_in_parts(
    like: Blockwise, lying: Any, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> Blockwise:
    """The weight whose matrix `read` gives in parts; a process reads those of its own devices.

    Double quantisation needs the absmax of whole layers, so that all processes must call this: 1/64
    of the weights, at blocks of 64, goes between them.

    Args:
      like: the weight, abstract.
      lying: a tree like it, with the sharding of each array, which cuts no block.
      read: the matrix `[stack..., d_in, d_out]` at one slice an axis.

    Raises:
      ValueError: if what is read holds NaN or infinity.
    """
    blocks, made = like.absmax.shape, {}

    def part(which: int, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        at = [slice(*axis.indices(size)[:2]) for axis, size in zip(index, shape, strict=True)]
        scale = like.block_size * blocks[-2] // shape[-2]  # from rows of the array to the matrix's
        at[-2] = slice(at[-2].start * scale, at[-2].stop * scale)
        if str(at) not in made:
            matrix = read(tuple(at))
            made[str(at)] = storage.store_singly(matrix, like.codebook, block_size=like.block_size)
        return made[str(at)][which]

    def codes_of(index):
        return part(0, like.codes.shape, index)

    def absmax_of(index):
        return part(1, blocks, index)

    codes = jax.make_array_from_callback(like.codes.shape, lying.codes, codes_of)
    if not isinstance(like.absmax, DoubleQuantized):
        absmax: Any = jax.make_array_from_callback(blocks, lying.absmax, absmax_of)
    else:
        single = jax.make_array_from_callback(blocks, lying.absmax.codes, absmax_of)
        nested: Any = storage.store_doubly(multihost_utils.process_allgather(single, tiled=True))
        absmax = jax.tree.map(_cut, DoubleQuantized(*nested), lying.absmax)
    return dataclasses.replace(cast(Any, like), codes=codes, absmax=absmax)


def _cut(array: np.ndarray, sharding: Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
