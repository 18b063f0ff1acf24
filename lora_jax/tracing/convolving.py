"""Convolutions with a tracked kernel."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.products import Convolution
from lora_jax.tracing.applying import arranged
from lora_jax.tracing.axes import Atom, size_of
from lora_jax.tracing.plain import read_dense
from lora_jax.tracing.tracked import Convolved, is_tracked


def rule(eqn: Any, operands: list[Any]) -> list[Any]:
    x, kernel = operands
    params = eqn.params
    if is_tracked(x):
        return read_dense(eqn, operands)
    if params["batch_group_count"] > 1:
        kernel.read("is a convolution in groups of its batch, which no factors serve")
        return read_dense(eqn, operands)
    numbers, result = params["dimension_numbers"], eqn.outvars[0].aval

    def run(x, w, groups):
        return jax.lax.conv_general_dilated(
            x,
            w,
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            numbers,
            groups,
            precision=params["precision"],
            preferred_element_type=result.dtype,
        )

    convolved = Convolved(
        x=numbers.lhs_spec,
        w=numbers.rhs_spec,
        out=numbers.out_spec,
        groups=params["feature_group_count"],
        run=run,
        shape=result.shape,
    )
    return [kernel.convolve(x, convolved)]


def product_of(
    convolved: Convolved, kernel: Sequence[Sequence[Atom]], d_in: Sequence[Atom]
) -> Convolution:
    """The product of one group: of `x [batch, ...]` in the program's order, or without a batch, and
    the kernel as a matrix `[d_in, n]`, to `[batch, space..., n]`.

    Args:
      convolved: the program's convolution.
      kernel: the atoms of each axis of the kernel.
      d_in: the atoms of the matrix's rows, in order.
    """
    out_place = convolved.w[0]

    def as_kernel(matrix):
        n = matrix.shape[-1]
        atoms = [*(atom for atom in d_in if atom.size > 1), "n"]
        split = matrix.reshape([*(atom.size for atom in atoms[:-1]), n])
        order = [
            label
            for place, group in enumerate(kernel)
            for label in (["n"] if place == out_place else [a for a in group if a.size > 1])
        ]
        sizes = [n if place == out_place else size_of(group) for place, group in enumerate(kernel)]
        return arranged(split, atoms, order).reshape(sizes)

    def run(x, matrix):
        is_batch = x.ndim == len(convolved.x)
        x = jnp.moveaxis(x if is_batch else x[None], 0, convolved.x[0])
        y = convolved.run(x, as_kernel(matrix).astype(x.dtype), 1)
        y = jnp.transpose(y, [convolved.out[0], *convolved.out[2:], convolved.out[1]])
        return y if is_batch else y[0]

    return Convolution(run)
