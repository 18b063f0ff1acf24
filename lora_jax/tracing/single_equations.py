"""Rules of single equations on a tracked leaf: they move its axes, or apply it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.tracing import convolving, plain, slicing
from lora_jax.tracing.plain import read_dense
from lora_jax.tracing.tracked import Product, is_tracked


def _moving(axes_after: Callable[[Any, Any], Any]) -> Callable:
    """The rule of an equation that rearranges its first operand to `axes_after(axes, eqn)`, or
    does something else to it where that is None."""

    def rule(eqn, operands):
        value, *rest = operands
        axes = axes_after(value.axes, eqn)
        if axes is None or rest:
            return read_dense(eqn, operands)
        return [value.moved(axes, lambda array: plain.run_one(eqn, [array])[0])]

    return rule


def _reshaped(axes, eqn):
    order = eqn.params["dimensions"]
    return (axes if order is None else axes.transposed(order)).reshaped(eqn.params["new_sizes"])


def _convert(eqn, operands):
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return read_dense(eqn, operands)
    return [operands[0].cast(dtype)]


def _on_every_array(eqn, operands):
    return [operands[0].each(lambda array: plain.run_one(eqn, [array])[0])]


def _barrier(eqn, operands):
    leaves, treedef = jax.tree.flatten(operands)
    return treedef.unflatten(jax.lax.optimization_barrier(leaves))


def _same(eqn, operands):
    return operands[:1]


def _dot_general(eqn, operands):
    left, right = operands
    if is_tracked(left) and is_tracked(right):
        return read_dense(eqn, operands)
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


RULES: dict[str, Callable[[Any, list[Any]], list[Any]]] = {
    "transpose": _moving(lambda axes, eqn: axes.transposed(eqn.params["permutation"])),
    "reshape": _moving(_reshaped),
    "squeeze": _moving(lambda axes, eqn: axes.without(eqn.params["dimensions"])),
    "broadcast_in_dim": _moving(
        lambda axes, eqn: axes.broadcast(eqn.params["shape"], eqn.params["broadcast_dimensions"])
    ),
    "convert_element_type": _convert,
    "stop_gradient": _on_every_array,
    "pvary": _on_every_array,
    "optimization_barrier": _barrier,
    "copy": _same,
    "sharding_constraint": _same,
    "reshard": _same,
    "dot_general": _dot_general,
    "conv_general_dilated": convolving.rule,
    **slicing.RULES,
}
