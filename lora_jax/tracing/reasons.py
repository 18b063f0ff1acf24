"""Why a leaf is no matrix: what a program does with it, and where."""

from collections.abc import Sequence
from typing import Any

from jax.extend import core

from lora_jax.tracing.interpreter import line_of
from lora_jax.tracing.probe import Use

_SAID = {
    "mul": "multiplied entry by entry, as a norm's scale is",
    "div": "divided entry by entry",
    "add": "added, as a bias is",
    "sub": "subtracted, as a mean is",
    "conv_general_dilated": "a convolution that is no plain product",
    "dot_general": "contracted whole, or with none of its axes",
    "gather": "picked entry by entry",
}
_ARRANGE = {"broadcast_in_dim", "reshape", "convert_element_type", "squeeze", "transpose"}
_CALLS = {"jit", "closed_call"}


def reason_of(uses: Sequence[Use]) -> str:
    """For the uses of a leaf that no layout serves."""
    if not uses:
        return "never used"
    use = next((use for use in uses if use.read), uses[0])
    if not use.inside:
        return "returned"
    eqn = _consumer(*use.inside[-1])
    name = eqn.primitive.name
    lines = (line_of(eqn) for _, eqn in reversed([*use.inside, (None, eqn)]))
    line = next((line for line in lines if line), "an unknown line")
    return f"{_SAID.get(name, 'no product')} ({name} at {line})"


def _consumer(jaxpr: Any, eqn: Any) -> Any:
    """The equation that computes with what `eqn` only arranges: a norm's scale is repeated over the
    rows of an activation before it multiplies them."""
    while eqn.primitive.name in _ARRANGE:
        (made,) = eqn.outvars
        found = [other for other in jaxpr.eqns if any(var is made for var in other.invars)]
        if not found:
            return eqn
        eqn = found[0]
        while eqn.primitive.name in _CALLS:
            place = next(i for i, var in enumerate(eqn.invars) if var is made)
            (jaxpr,) = (
                getattr(inner, "jaxpr", inner) for inner in core.jaxprs_in_params(eqn.params)
            )
            made = jaxpr.invars[place]
            found = [other for other in jaxpr.eqns if any(var is made for var in other.invars)]
            if not found:
                return eqn
            eqn = found[0]
    return eqn
