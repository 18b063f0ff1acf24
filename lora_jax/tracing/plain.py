"""Runs equations unchanged."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

from lora_jax.tracing.tracked import is_tracked


def variables(eqn: Any) -> list[Any]:
    """The variables that the equation reads."""
    return [atom for atom in eqn.invars if not isinstance(atom, core.Literal)]


def run(eqns: Sequence[Any], values: Mapping[Any, Any]) -> dict[Any, Any]:
    """`{variable: value}` of all that these equations, in their order, define.

    They run through a jaxpr of their own, which keeps named scopes, effects and custom rules.
    """
    made = [var for eqn in eqns for var in eqn.outvars if not isinstance(var, core.DropVar)]
    defined = set(made)
    read = dict.fromkeys(v for eqn in eqns for v in variables(eqn) if v not in defined)
    names = core.DebugInfo("adapt", "equations", ("",) * len(read), ("",) * len(made))
    part = core.Jaxpr([], list(read), made, list(eqns), debug_info=names)
    run_part = core.jaxpr_as_fun(core.ClosedJaxpr(part, []))
    results = run_part(*(values[var] for var in read))
    return dict(zip(made, results, strict=True))


def run_one(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The results of one equation for the given operands."""
    results = [core.Var(var.aval) for var in eqn.outvars]  # also those that are not read
    given = zip(eqn.invars, operands, strict=True)
    values = {atom: value for atom, value in given if not isinstance(atom, core.Literal)}
    made = run([eqn.replace(outvars=results)], values)
    return [made[var] for var in results]


def read_dense(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Runs an equation that has no rule on the plain array of each tracked operand."""
    return run_one(eqn, [v.read() if is_tracked(v) else v for v in operands])


def dense(value: Any) -> Any:
    """The plain array of a value, tracked or not."""
    return value.dense() if is_tracked(value) else value


def shapes(values: Any) -> Any:
    """The same tree with the shape and dtype of each array and each tracked leaf."""

    def shape(value):
        return jax.ShapeDtypeStruct(value.shape, value.dtype)

    return jax.tree.map(shape, values, is_leaf=is_tracked)
