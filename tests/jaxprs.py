"""Walks through the programs that functions are traced to."""

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def equations(program: Any) -> Iterator[Any]:
    """Every equation of a jaxpr, and of those inside it."""
    if isinstance(program, ClosedJaxpr):
        program = program.jaxpr
    for eqn in program.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_program):
            if _is_program(inner):
                yield from equations(inner)


def of(name: str, function: Any, *arguments: Any) -> list[Any]:
    """The equations of one primitive in what `function` is traced to."""
    program = jax.make_jaxpr(function)(*arguments)
    return [eqn for eqn in equations(program) if eqn.primitive.name == name]


def _is_program(value: Any) -> bool:
    return isinstance(value, ClosedJaxpr | Jaxpr)
