"""Rules of equations that read a part of a tracked leaf: its layers, or rows of its matrix."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.tracing.plain import read_dense
from lora_jax.tracing.tracked import Lookup, is_tracked

_Mode = jax.lax.GatherScatterMode


def _slice(eqn, operands):
    (value,) = operands
    starts, sizes = eqn.params["start_indices"], eqn.outvars[0].aval.shape
    strides = eqn.params["strides"] or (1,) * len(starts)
    for axis, (start, size, stride) in enumerate(zip(starts, sizes, strides, strict=True)):
        value = _window(value, axis, start + stride * np.arange(size, dtype=np.int32))
    return [value]


def _dynamic_slice(eqn, operands):
    value, *starts = operands
    for axis, (start, size) in enumerate(zip(starts, eqn.params["slice_sizes"], strict=True)):
        value = _dynamic_window(value, axis, start, size)
    return [value]


def _split(eqn, operands):
    (value,) = operands
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    entries = np.arange(value.shape[axis], dtype=np.int32)
    parts = np.split(entries, np.cumsum(sizes)[:-1])
    return [_window(value, axis, picked) for picked in parts]


def _unstack(eqn, operands):
    (value,) = operands
    axis = eqn.params["axis"]
    places = np.arange(value.shape[axis], dtype=np.int32)
    return [_squeezed(_window(value, axis, places[i : i + 1]), (axis,)) for i in places]


def _squeezed(value, axes):
    def squeeze(array):
        return jnp.squeeze(array, axes)

    if not is_tracked(value):
        return squeeze(value)
    arranged = value.arranged("squeeze", {"dimensions": axes})
    return squeeze(value.read()) if arranged is None else arranged


def _dynamic_window(value, axis, start, size):
    first = _clamped(start, value.shape[axis] - size)
    return _window(value, axis, first + jnp.arange(size, dtype=jnp.int32))


def _window(value, axis, picked):
    """The entries `picked`, increasing integers within bounds, along one axis."""
    size = picked.shape[0]
    if size == value.shape[axis]:
        return value
    if size == 0:
        return jnp.zeros((*value.shape[:axis], 0, *value.shape[axis + 1 :]), value.dtype)
    if is_tracked(value):
        return value.window(axis, picked)
    return jnp.take(value, picked, axis=axis, mode="clip")


def _clamped(integers, last: int) -> jax.Array:
    """Integers of any dtype as int32, moved into `[0, last]`."""
    return jnp.clip(integers, 0, min(last, jnp.iinfo(integers.dtype).max)).astype(jnp.int32)


def _gather(eqn, operands):
    table, indices = operands
    dims, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
    if dims.operand_batching_dims:
        return read_dense(eqn, operands)
    if mode == _Mode.CLIP and indices.ndim == 1:
        return [_slice_of_gather(eqn, table, indices)]
    axis = _looked_up(eqn, table)
    if axis is None:
        return read_dense(eqn, operands)
    ids = indices[..., dims.start_index_map.index(axis)]
    last = table.shape[axis] - 1
    # Where the slices keep the axis, they do so at size 1.
    kept = None if dims.collapsed_slice_dims else dims.offset_dims[axis]
    places = tuple(d - (kept is not None and d > kept) for d in dims.offset_dims if d != kept)
    rows = table.rows(_clamped(ids, last), Lookup(axis, places))
    if is_tracked(rows):
        ids_at = [i for i in range(len(rows.shape)) if i not in places]
        return [_of_layers(eqn, rows, ids, last, kept, ids_at)]
    if mode != _Mode.CLIP:
        within = (ids >= 0) & (ids <= min(last, jnp.iinfo(ids.dtype).max))
        within = jnp.broadcast_to(jnp.expand_dims(within, places), rows.shape)
        rows = jnp.where(within, rows, _outside(eqn, rows))
    return [rows if kept is None else jnp.expand_dims(rows, kept)]


def _of_layers(eqn, layers, ids, last, kept, ids_at):
    """Layers that the ids picked out of a stack, filled out of bounds where the gather fills."""
    if eqn.params["mode"] == _Mode.FILL_OR_DROP:
        fill = eqn.params["fill_value"]
        within = (ids >= 0) & (ids <= min(last, jnp.iinfo(ids.dtype).max))
        layers = layers.filled(within, math.nan if fill is None else float(fill), ids_at)
    if kept is None or not is_tracked(layers):
        return layers if kept is None else jnp.expand_dims(layers, kept)
    shape = (*layers.shape[:kept], 1, *layers.shape[kept:])
    axes = layers.axes.broadcast(shape, [i for i in range(len(shape)) if i != kept])
    return layers.moved(axes, lambda array: jnp.expand_dims(array, kept))


def _outside(eqn, rows: jax.Array) -> jax.Array:
    """What a gather reads out of bounds, for `rows` read at the nearest index within."""
    if eqn.params["mode"] == _Mode.PROMISE_IN_BOUNDS:
        return jax.lax.stop_gradient(rows)  # as XLA does where the promise is broken
    fill = eqn.params["fill_value"]
    return jnp.array(jnp.nan if fill is None else fill, rows.dtype)


def _slice_of_gather(eqn, value, starts):
    """A `dynamic_slice` in the gather that a vmap over an axis that it does not slice makes of
    it."""
    dims = eqn.params["dimension_numbers"]
    given = dict(zip(dims.start_index_map, starts, strict=True))
    for axis, size in enumerate(eqn.params["slice_sizes"]):
        value = _dynamic_window(value, axis, given.get(axis, jnp.int32(0)), size)
    return _squeezed(value, dims.collapsed_slice_dims)


def _looked_up(eqn, table) -> int | None:
    """The axis along which a gather picks single entries of a table, with all of its other axes;
    None where it does something else."""
    dims, sizes, mode = (eqn.params[k] for k in ("dimension_numbers", "slice_sizes", "mode"))
    picked = [
        axis
        for axis, size in enumerate(sizes)
        if size != table.shape[axis] or axis in dims.collapsed_slice_dims
    ]
    if len(picked) != 1 or picked[0] not in dims.start_index_map or sizes[picked[0]] != 1:
        return None
    # The start along an axis that is not sliced is clamped to 0; but out of bounds it is filled.
    clamps = mode in (_Mode.CLIP, _Mode.PROMISE_IN_BOUNDS)
    fills = mode == _Mode.FILL_OR_DROP and list(dims.start_index_map) == picked
    return picked[0] if clamps or fills else None


RULES: dict[str, Callable[[Any, list[Any]], list[Any]]] = {
    "slice": _slice,
    "split": _split,
    "unstack": _unstack,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
}
