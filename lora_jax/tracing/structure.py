"""What single equations do to a tracked leaf: move its axes, apply it, or read it whole."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.tracing import plain
from lora_jax.tracing.tracked import Lookup, Product, is_tracked


def read_whole(eqn: Any, operands: list[Any]) -> list[Any]:
    """An equation without a rule: each tracked operand is asked for its plain array."""
    name = eqn.primitive.name
    return plain.run_one(eqn, [v.read(name) if is_tracked(v) else v for v in operands])


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
        value = _window(value, axis, start, size, stride)
    return [value]


def _dynamic_slice(eqn, operands):
    value, *starts = operands
    for axis, (start, size) in enumerate(zip(starts, eqn.params["slice_sizes"], strict=True)):
        value = _window(value, axis, start, size, 1)
    return [value]


def _window(value, axis, start, size, stride):
    if size == value.shape[axis]:
        return value
    if is_tracked(value):
        return value.window(axis, start, size, stride)
    return jnp.take(value, start + stride * jnp.arange(size), axis=axis, mode="clip")


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
    dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if not is_tracked(table) or is_tracked(indices) or dims.operand_batching_dims:
        return read_whole(eqn, operands)
    # Clipped starts of whole axes are 0, whatever they say.
    clipped = eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP
    narrow = [axis for axis, size in enumerate(sizes) if size != table.shape[axis]]
    indexed = narrow if clipped else list(dims.start_index_map)
    if len(indexed) != 1 or indexed != narrow or sizes[indexed[0]] != 1:
        return read_whole(eqn, operands)
    (axis,) = indexed
    column = dims.start_index_map.index(axis)
    ids = _within(indices[..., column], table.shape[axis], eqn.params["mode"])
    if dims.collapsed_slice_dims == (axis,):
        return [table.rows(ids, Lookup(axis, dims.offset_dims))]
    kept = dims.offset_dims[axis]
    others = tuple(d - (d > kept) for d in dims.offset_dims if d != kept)
    return [jnp.expand_dims(table.rows(ids, Lookup(axis, others)), kept)]


def _within(ids: jax.Array, size: int, mode: Any) -> jax.Array:
    """Ids that `embed` reads as the gather's mode would: clipped, or out of bounds above."""
    if mode == jax.lax.GatherScatterMode.CLIP:
        return jnp.clip(ids, 0, size - 1)
    if mode == jax.lax.GatherScatterMode.FILL_OR_DROP:
        return jnp.where(ids < 0, jnp.array(size, ids.dtype), ids)
    return ids


RULES: dict[str, Callable[[Any, list[Any]], list[Any]]] = {
    "transpose": _moving(lambda axes, eqn: axes.transposed(eqn.params["permutation"])),
    "reshape": _moving(lambda axes, eqn: axes.reshaped(eqn.params["new_sizes"])),
    "squeeze": _moving(lambda axes, eqn: axes.without(eqn.params["dimensions"])),
    "broadcast_in_dim": _moving(
        lambda axes, eqn: axes.broadcast(eqn.params["shape"], eqn.params["broadcast_dimensions"])
    ),
    "convert_element_type": _convert,
    "slice": _slice,
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
