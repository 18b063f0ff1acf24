"""What single equations do to a tracked leaf: move its axes, apply it, or read it whole."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.tracing import plain
from lora_jax.tracing.tracked import Lookup, Product, is_tracked

_Mode = jax.lax.GatherScatterMode


def read_whole(eqn: Any, operands: list[Any]) -> list[Any]:
    """An equation without a rule: each tracked operand is asked for its plain array."""
    return plain.run_one(eqn, [v.read() if is_tracked(v) else v for v in operands])


def _moving(axes_after: Callable[[Any, Any], Any]) -> Callable:
    """The rule of an equation that rearranges its first operand to `axes_after(axes, eqn)`, or
    does something else to it where that is None."""

    def rule(eqn, operands):
        value, *rest = operands
        axes = axes_after(value.axes, eqn)
        if axes is None or rest:
            return read_whole(eqn, operands)
        return [value.moved(axes, lambda array: plain.run_one(eqn, [array])[0])]

    return rule


def _reshaped(axes, eqn):
    order = eqn.params["dimensions"]
    return (axes if order is None else axes.transposed(order)).reshaped(eqn.params["new_sizes"])


def _convert(eqn, operands):
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return read_whole(eqn, operands)
    return [operands[0].cast(dtype)]


def _on_every_array(eqn, operands):
    return [operands[0].each(lambda array: plain.run_one(eqn, [array])[0])]


def _barrier(eqn, operands):
    leaves, treedef = jax.tree.flatten(operands)
    return treedef.unflatten(jax.lax.optimization_barrier(leaves))


def _same(eqn, operands):
    return operands[:1]


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
        first = _clamped(start, value.shape[axis] - size)
        value = _window(value, axis, first + jnp.arange(size, dtype=jnp.int32))
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

    def without(array):
        return jnp.squeeze(array, axis)

    layers = [_window(value, axis, np.array([i], np.int32)) for i in range(value.shape[axis])]
    return [
        layer.moved(layer.axes.without((axis,)), without) if is_tracked(layer) else without(layer)
        for layer in layers
    ]


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


def _dot_general(eqn, operands):
    left, right = operands
    if is_tracked(left) and is_tracked(right):
        return read_whole(eqn, operands)
    first = is_tracked(left)
    contracted, batch = eqn.params["dimension_numbers"]
    ours, theirs = (0, 1) if first else (1, 0)
    result = eqn.outvars[0].aval
    product = Product(
        w_contracted=contracted[ours],
        x_contracted=contracted[theirs],
        w_batch=batch[ours],
        x_batch=batch[theirs],
        w_first=first,
        precision=eqn.params["precision"],
        dtype=result.dtype,
        shape=result.shape,
    )
    weight, x = (left, right) if first else (right, left)
    return [weight.contract(x, product)]


def _gather(eqn, operands):
    table, indices = operands
    dims, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
    axis = _looked_up(eqn, operands)
    if axis is None:
        return read_whole(eqn, operands)
    ids = indices[..., dims.start_index_map.index(axis)]
    last = table.shape[axis] - 1
    # Where the slices keep the axis, they do so at size 1.
    kept = None if dims.collapsed_slice_dims else dims.offset_dims[axis]
    places = tuple(d - (kept is not None and d > kept) for d in dims.offset_dims if d != kept)
    rows = table.rows(_clamped(ids, last), Lookup(axis, places))
    if mode != _Mode.CLIP:
        within = (ids >= 0) & (ids <= min(last, jnp.iinfo(ids.dtype).max))
        within = jnp.broadcast_to(jnp.expand_dims(within, places), rows.shape)
        rows = jnp.where(within, rows, _outside(eqn, rows))
    return [rows if kept is None else jnp.expand_dims(rows, kept)]


def _outside(eqn, rows: jax.Array) -> jax.Array:
    """What a gather reads out of bounds, for `rows` read at the nearest place within."""
    if eqn.params["mode"] == _Mode.PROMISE_IN_BOUNDS:
        return jax.lax.stop_gradient(rows)  # as XLA does to who breaks the promise
    fill = eqn.params["fill_value"]
    return jnp.array(jnp.nan if fill is None else fill, rows.dtype)


def _looked_up(eqn, operands) -> int | None:
    """The axis along which a gather picks single entries of a tracked table, whole in all other
    axes; None where it does something else."""
    table, indices = operands
    dims, sizes, mode = (eqn.params[k] for k in ("dimension_numbers", "slice_sizes", "mode"))
    if not is_tracked(table) or is_tracked(indices) or dims.operand_batching_dims:
        return None
    picked = [
        axis
        for axis, size in enumerate(sizes)
        if size != table.shape[axis] or axis in dims.collapsed_slice_dims
    ]
    if len(picked) != 1 or picked[0] not in dims.start_index_map or sizes[picked[0]] != 1:
        return None
    # The start of a whole axis is clamped to 0, whatever it says; but out of bounds it is filled.
    clamps = mode in (_Mode.CLIP, _Mode.PROMISE_IN_BOUNDS)
    fills = mode == _Mode.FILL_OR_DROP and list(dims.start_index_map) == picked
    return picked[0] if clamps or fills else None


RULES: dict[str, Callable[[Any, list[Any]], list[Any]]] = {
    "transpose": _moving(lambda axes, eqn: axes.transposed(eqn.params["permutation"])),
    "reshape": _moving(_reshaped),
    "squeeze": _moving(lambda axes, eqn: axes.without(eqn.params["dimensions"])),
    "broadcast_in_dim": _moving(
        lambda axes, eqn: axes.broadcast(eqn.params["shape"], eqn.params["broadcast_dimensions"])
    ),
    "convert_element_type": _convert,
    "slice": _slice,
    "split": _split,
    "unstack": _unstack,
    "dynamic_slice": _dynamic_slice,
    "stop_gradient": _on_every_array,
    "pvary": _on_every_array,
    "pcast": _on_every_array,
    "optimization_barrier": _barrier,
    "copy": _same,
    "copy_p": _same,
    "sharding_constraint": _same,
    "reshard": _same,
    "dot_general": _dot_general,
    "gather": _gather,
}
