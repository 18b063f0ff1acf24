"""The walk over a jaxpr's equations: those without a tracked operand run unchanged."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from lora_jax.tracing import inner_jaxprs, plain, single_equations
from lora_jax.tracing.tracked import RefusedError, is_tracked

_JAX = os.path.dirname(os.path.abspath(jax.__file__))
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def evaluate(jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    """The results of a jaxpr, open or closed, for operands of which some are `Tracked`.

    Raises:
      RefusedError: where a leaf is used in a way that no rule allows.
    """
    consts = getattr(jaxpr, "consts", ())
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, operands, strict=True))
    waiting: list[Any] = []

    def run_waiting():
        values.update(plain.run(waiting, values))
        waiting.clear()

    def value(atom):
        if isinstance(atom, core.Literal):
            return np.asarray(atom.val, atom.aval.dtype)
        return values[atom]

    for eqn in jaxpr.eqns:
        read = plain.variables(eqn)
        if not any(is_tracked(values.get(var)) for var in read):
            waiting.append(eqn)
            continue
        if not all(var in values for var in read):
            run_waiting()
        results = _apply_rule(jaxpr, eqn, [value(atom) for atom in eqn.invars])
        values.update(zip(eqn.outvars, results, strict=True))
    run_waiting()
    return [value(atom) for atom in jaxpr.outvars]


def _apply_rule(jaxpr: Any, eqn: Any, operands: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    watched = next(operand for operand in operands if is_tracked(operand))
    try:
        with watched.within(jaxpr, eqn):
            if name in inner_jaxprs.RULES:
                return inner_jaxprs.RULES[name](eqn, operands, evaluate)
            return single_equations.RULES.get(name, plain.read_dense)(eqn, operands)
    except RefusedError as error:
        settled = [value.settled() if is_tracked(value) else value for value in operands]
        if any(new is not old for new, old in zip(settled, operands, strict=True)):
            is_plain = not any(map(is_tracked, settled))
            return plain.run_one(eqn, settled) if is_plain else _apply_rule(jaxpr, eqn, settled)
        error.primitive = error.primitive or name
        error.line = error.line or line_of(eqn)  # a cached inner trace does not know its caller
        raise


def line_of(eqn: Any) -> str | None:
    """The innermost line of the user's code, else of their library's, that made this equation."""
    traceback = eqn.source_info.traceback
    frames = [
        frame
        for frame in (traceback.frames if traceback else ())
        if not frame.file_name.startswith((_JAX + os.sep, _OURS + os.sep))
    ]
    own = [frame for frame in frames if "site-packages" not in frame.file_name]
    for frame in (own or frames)[:1]:
        return f"{frame.file_name}:{frame.line_num}"
    return None
