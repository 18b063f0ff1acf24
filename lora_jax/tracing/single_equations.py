"""Rules of single equations on a tracked leaf: they move its axes, or apply it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.tracing import convolving, experts, joined, plain, slicing
from lora_jax.tracing.plain import read_dense
from lora_jax.tracing.tracked import AFTER, Product, is_tracked


def _arrange(eqn, operands):
    """Rearranges the first operand, or does something else to it."""
    value, *rest = operands
    arranged = None if rest else value.arranged(eqn.primitive.name, eqn.params)
    return read_dense(eqn, operands) if arranged is None else [arranged]


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


def _multiply(eqn, operands):
    tracked = [value for value in operands if is_tracked(value)]
    if len(tracked) == 2:
        return read_dense(eqn, operands)
    first = is_tracked(operands[0])
    value, factor = operands if first else operands[::-1]
    aval = eqn.outvars[0].aval
    shapes = [1 if f == 1 else s for f, s in zip(factor.shape, value.shape, strict=False)]
    if tuple(aval.shape) != value.shape or list(factor.shape) != shapes[: len(factor.shape)]:
        return read_dense(eqn, operands)
    if eqn.primitive.name == "div":
        if not first:
            return read_dense(eqn, operands)
        factor = 1 / factor
    return [value.multiplied(jnp.asarray(factor))]


def _negate(eqn, operands):
    return [operands[0].multiplied(jnp.asarray(-1, operands[0].dtype))]


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
    **dict.fromkeys(AFTER, _arrange),
    "convert_element_type": _convert,
    "stop_gradient": _on_every_array,
    "pvary": _on_every_array,
    "optimization_barrier": _barrier,
    "copy": _same,
    "sharding_constraint": _same,
    "reshard": _same,
    "dot_general": _dot_general,
    "mul": _multiply,
    "div": _multiply,
    "neg": _negate,
    "conv_general_dilated": convolving.rule,
    "ragged_dot_general": experts.rule,
    **slicing.RULES,
    **joined.RULES,
}
