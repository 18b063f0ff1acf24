"""Products of rows, each with an expert of a tracked stack."""

from typing import Any

import jax

from lora_jax.tracing import plain
from lora_jax.tracing.tracked import Ragged, is_tracked


def rule(eqn: Any, operands: list[Any]) -> list[Any]:
    x, w, *rest = operands
    params = eqn.params
    numbers = params["ragged_dot_dimension_numbers"]
    (x_contracted, w_contracted), batch = numbers.dot_dimension_numbers
    x_rows = [axis for axis in range(len(x.shape)) if axis not in x_contracted]
    is_grouped = tuple(numbers.lhs_ragged_dimensions) == tuple(x_rows) and not any(batch)
    one_each = len(x_rows) == 1 and len(numbers.rhs_group_dimensions) == 1
    if is_tracked(x) or not (is_grouped and one_each) or len(rest) != 1:
        return plain.read_dense(eqn, operands)
    dtype = eqn.outvars[0].aval.dtype

    def run(x, w, sizes):
        return jax.lax.ragged_dot(
            x,
            w.astype(x.dtype),
            sizes,
            precision=params["precision"],
            preferred_element_type=dtype,
        )

    ragged = Ragged(
        x_row=x_rows[0],
        x_contracted=tuple(x_contracted),
        w_expert=numbers.rhs_group_dimensions[0],
        w_contracted=tuple(w_contracted),
        run=run,
        run_as_traced=lambda *given: plain.run_one(eqn, given)[0],
    )
    return [w.by_expert(x, rest[0], ragged)]
