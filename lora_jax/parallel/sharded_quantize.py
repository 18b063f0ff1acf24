"""Quantises a weight shard by shard: each process reads and encodes what its devices hold."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Sharding

from lora_jax.parallel import hosts
from lora_jax.paths import naming
from lora_jax.quant import storage
from lora_jax.quant.double import DoubleQuantized
from lora_jax.quant.quantized import Quantized


def quantized_in_parts(
    sharding: Callable[[str, Any], Any],
    finish: Callable[[str, Any], Any],
    otherwise: Callable[[str, Any], Any],
) -> Callable[[str, Any], Any]:
    """A `Place` for loaders: quantises each leaf as it is read, every process the parts that its
    own devices hold.

    Double quantisation needs the absmax of complete layers, so that all processes must load the
    same leaves in the same order: 1/64 of the weights, at blocks of 64, is sent between them.

    Args:
      sharding: `(path, quantised weight)` to a tree of shardings like it, which cuts no block.
      finish: from `quantizer`.
      otherwise: places the leaves that it does not target.

    Raises:
      ValueError: in every process, naming the path, if one of them cannot read or quantise its
        part, which may hold NaN or infinity.
    """

    def place(path: str, leaf: Any) -> Any:
        abstract = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        like = jax.eval_shape(functools.partial(finish, path), abstract)
        if not isinstance(like, Quantized):
            return otherwise(path, leaf)
        shardings = sharding(path, like)
        with naming(path):
            return _made(like, shardings, leaf.read)

    return place


def _made(
    like: Quantized, shardings: Any, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> Quantized:
    """The weight like `like`, its arrays sharded by `shardings`, of the matrix whose parts `read`
    returns for one slice an axis."""
    *stack, packed, columns = like.codes.shape
    rows = packed * like.codes_per_byte
    shapes = like.encoded_shapes((*stack, rows, columns), block_size=like.block_size)
    made: dict[str, dict[str, np.ndarray]] = {}  # the arrays, by place in the matrix

    def in_matrix(shape: tuple[int, ...], index: Any) -> tuple[slice, ...]:
        at = [slice(*axis.indices(size)[:2]) for axis, size in zip(index, shape, strict=True)]
        scale = rows // shape[-2]  # from rows of the array to the matrix's
        at[-2] = slice(at[-2].start * scale, at[-2].stop * scale)
        return tuple(at)

    def global_array(name: str, sharding: Sharding) -> jax.Array:
        shape = shapes[name].shape
        return jax.make_array_from_callback(
            shape, sharding, lambda index: made[str(in_matrix(shape, index))][name]
        )

    with _failing_together(shardings.codes):
        for index in shardings.codes.addressable_devices_indices_map(like.codes.shape).values():
            at = in_matrix(like.codes.shape, index)
            if str(at) not in made:
                made[str(at)] = like.encoded(read(at), block_size=like.block_size)
    arrays: dict[str, Any] = {}
    for name in shapes:
        sharding = getattr(shardings, name)
        is_doubled = isinstance(sharding, DoubleQuantized)
        arrays[name] = global_array(name, sharding.codes if is_doubled else sharding)
        if is_doubled:
            nested: Any = storage.store_doubly(np.asarray(hosts.gathered(arrays[name])))
            arrays[name] = hosts.place(DoubleQuantized(**nested), sharding)
    return dataclasses.replace(cast(Any, like), **arrays)


@contextlib.contextmanager
def _failing_together(sharding: Sharding) -> Iterator[None]:
    """Raises on all processes that share the array when one of them raises: none waits for ever."""
    error: ValueError | None = None
    try:
        yield
    except ValueError as raised:
        error = raised
    failed = error is not None
    if not sharding.is_fully_addressable:
        failed = any(hosts.exchange(failed))
    if failed:
        raise error or ValueError(
            "another process cannot quantise its part; its own error says why."
        )
