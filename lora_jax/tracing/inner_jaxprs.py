"""Rules of equations that hold jaxprs of their own, which are walked too."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.tracing import plain
from lora_jax.tracing.tracked import RefusedError, is_tracked

Evaluate = Callable[[Any, Any], list[Any]]
RETURNS = "returns it from a function with a gradient of its own"


def _jit(eqn, operands, evaluate: Evaluate):
    """Inlined; its sharding constraints on plain values are kept."""

    def constrained(value, sharding):
        if is_tracked(value) or not isinstance(sharding, jax.sharding.Sharding):
            return value
        return jax.lax.with_sharding_constraint(value, sharding)

    params = eqn.params
    inside = map(constrained, operands, params.get("in_shardings", (None,) * len(operands)))
    results = evaluate(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"], list(inside))
    return list(map(constrained, results, params.get("out_shardings", (None,) * len(results))))


def _remat(eqn, operands, evaluate: Evaluate):
    params = eqn.params
    body = jax.checkpoint(
        lambda *operands: evaluate(params["jaxpr"], operands),
        policy=params["policy"],
        prevent_cse=params["prevent_cse"],
    )
    return body(*operands)


def _scan(eqn, operands, evaluate: Evaluate):
    params = eqn.params
    if "ft_in" in params:  # jax 0.11 on
        consts, carry, _ = params["ft_in"].unpack()
        num_consts, num_carry = len(consts), len(carry)
    else:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
    consts, carry = operands[:num_consts], operands[num_consts : num_consts + num_carry]
    xs = [_sliced(value) for value in operands[num_consts + num_carry :]]

    def body(carry, slices):
        layers = [make(piece) for (_, make), piece in zip(xs, slices, strict=True)]
        results = evaluate(params["jaxpr"], [*consts, *carry, *layers])
        stacked = _untracked(results[num_carry:], "stacks it up again")
        return _carried(carry, results[:num_carry]), stacked

    carry, ys = jax.lax.scan(
        body,
        carry,
        [piece for piece, _ in xs],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys]


def _sliced(value: Any) -> tuple[Any, Callable]:
    return value.scanned() if is_tracked(value) else (value, lambda piece: piece)


def _while(eqn, operands, evaluate: Evaluate):
    params = eqn.params
    middle, last = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts, carry = operands[:middle], operands[middle:last], operands[last:]
    return jax.lax.while_loop(
        lambda carry: evaluate(params["cond_jaxpr"], [*cond_consts, *carry])[0],
        lambda carry: _carried(carry, evaluate(params["body_jaxpr"], [*body_consts, *carry])),
        carry,
    )


def _cond(eqn, operands, evaluate: Evaluate):
    index, *rest = operands

    def taken(branch, *rest):
        return _untracked(evaluate(branch, rest), "returns it from a branch")

    branches = [functools.partial(taken, branch) for branch in eqn.params["branches"]]
    return jax.lax.switch(index, branches, *rest)


def _shard_map(eqn, operands, evaluate: Evaluate):
    params = eqn.params
    sizes = dict(params["mesh"].shape)

    def blocks(entry):
        names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        return functools.reduce(lambda count, name: count * sizes[name], names, 1)

    inside = [
        value.sharded((*spec, *(None,) * (len(value.shape) - len(spec))), blocks)
        if is_tracked(value)
        else (value, spec, lambda block: block)
        for value, spec in zip(operands, params["in_specs"], strict=True)
    ]

    def body(given):
        results = evaluate(
            params["jaxpr"], [make(v) for (_, _, make), v in zip(inside, given, strict=True)]
        )
        return _untracked(results, "returns it from its blocks")

    return jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=([spec for _, spec, _ in inside],),
        out_specs=list(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=params["newly_manual_axes"],
    )([value for value, _, _ in inside])


def _custom_gradient(eqn, operands, evaluate: Evaluate):
    """A function with a gradient of the user's own: that rule is traced for plain weights, and the
    trace evaluated with tracked ones. The gradient that it returns for a weight is that of
    the dense one, from which it is pulled back to the delta.
    """
    leaves, treedef = jax.tree.flatten(operands)
    moves = [_is_float(leaf) for leaf in leaves]
    floats = [i for i, operand in enumerate(operands) if _is_float(operand)]
    structure: Any = None

    def forward_and_residuals(*arrays):
        nonlocal structure

        def call(*moving):
            replaced = dict(zip(floats, moving, strict=True))
            return plain.run_one(eqn, [replaced.get(i, v) for i, v in enumerate(arrays)])

        results, pullback = jax.vjp(call, *(arrays[i] for i in floats))
        residuals, structure = jax.tree.flatten(pullback)
        return results, residuals

    @jax.custom_vjp
    def apply(moving, fixed):
        given = treedef.unflatten(_joined(moves, moving, fixed))
        return _untracked(evaluate(eqn.params["call_jaxpr"], given), RETURNS)

    def forward(moving, fixed):
        given = treedef.unflatten(_joined(moves, moving, fixed))
        jaxpr = jax.make_jaxpr(forward_and_residuals)(*plain.shapes(given))
        made = evaluate(jaxpr, given)
        count = len(eqn.outvars)
        results = _untracked(made[:count], RETURNS)
        return results, (structure.unflatten(made[count:]), moving, fixed)

    def backward(saved, cotangents):
        pullback, moving, fixed = saved
        residuals, structure = jax.tree.flatten(pullback, is_leaf=is_tracked)
        jaxpr = jax.make_jaxpr(lambda residuals, given: structure.unflatten(residuals)(given))(
            *plain.shapes((residuals, cotangents))
        )
        try:
            gradients = evaluate(jaxpr, [*residuals, *cotangents])
        except RefusedError as error:  # by now `adapt` has returned
            raise ValueError(error.message()) from error

        def dense(moving):
            values = treedef.unflatten(_joined(moves, moving, fixed))
            return [plain.dense(values[i]) for i in floats]

        return jax.vjp(dense, moving)[1](gradients)[0], None

    apply.defvjp(forward, backward)
    return apply(
        [leaf for leaf, moving in zip(leaves, moves, strict=True) if moving],
        [leaf for leaf, moving in zip(leaves, moves, strict=True) if not moving],
    )


def _is_float(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jnp.floating)


def _joined(moves: list[bool], moving: list[Any], fixed: list[Any]) -> list[Any]:
    first, second = iter(moving), iter(fixed)
    return [next(first) if moves_ else next(second) for moves_ in moves]


def _untracked(values: list[Any], reason: str) -> list[Any]:
    return [value.read(reason) if is_tracked(value) else value for value in values]


def _carried(before: Sequence[Any], after: Sequence[Any]) -> list[Any]:
    """What an iteration passes to the next. A weight that is carried must not change."""
    return [
        old.carried(new) if is_tracked(old) else _untracked([new], "carries it through a loop")[0]
        for old, new in zip(before, after, strict=True)
    ]


RULES: dict[str, Callable[[Any, list[Any], Evaluate], list[Any]]] = {
    "jit": _jit,
    "closed_call": _jit,
    "remat2": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
    "custom_jvp_call": _custom_gradient,
    "custom_vjp_call": _custom_gradient,
}
