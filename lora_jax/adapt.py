"""The function transform for models that know nothing of us."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import paths
from lora_jax.layouts import Layout
from lora_jax.tracing import plain
from lora_jax.tracing.axes import Axes
from lora_jax.tracing.interpreter import evaluate
from lora_jax.tracing.lazy import Lazy
from lora_jax.tracing.probe import Probe, Use, layout_of
from lora_jax.tracing.tracked import is_tracked
from lora_jax.weights import PyTree, is_weight


def adapt(fn: Callable) -> Callable:
    """`fn`, taking weights of any type where it took arrays."""

    def adapted(*args, **kwargs):
        leaves = paths.flatten((args, kwargs), is_leaf=is_weight)
        if not any(is_weight(leaf) for leaf in leaves.values()):
            return fn(*args, **kwargs)
        operands = [
            Lazy.of_leaf(_in_argument(path), leaf) if is_weight(leaf) else leaf
            for path, leaf in leaves.items()
        ]
        program = _trace(fn, (args, kwargs), operands)
        results = evaluate(program.jaxpr, program.operands)
        untouched = dict(zip(map(id, operands), leaves.values(), strict=True))
        return program.structure.unflatten([_returned(r, untouched) for r in results])

    return adapted


def infer_layouts(fn: Callable, params: PyTree, *args, **kwargs) -> dict[str, Layout | None]:
    """How `fn(params, *args, **kwargs)` uses each floating-point leaf of `params`."""
    uses: dict[str, list[Use]] = {}

    def note(path, use):
        uses.setdefault(path, []).append(use)

    def watched(path, leaf):
        if not (_is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)):
            return leaf
        uses[path] = []
        return Probe(plain.shapes(leaf), path, Axes.of_leaf(leaf.shape), note)

    leaves = paths.flatten(params, is_leaf=is_weight)
    others = jax.tree.leaves((args, kwargs), is_leaf=is_weight)
    probes = [watched(path, leaf) for path, leaf in leaves.items()]
    program = _trace(fn, ((params, *args), kwargs), [*probes, *map(_abstract, others)])
    jax.eval_shape(functools.partial(evaluate, program.jaxpr), program.operands)
    return {path: layout_of(path, leaves[path].shape, found) for path, found in uses.items()}


@dataclasses.dataclass(frozen=True)
class _Program:
    """A traced call: its jaxpr, the operands that it takes, the structure of its results."""

    jaxpr: Any
    operands: list[Any]
    structure: Any


def _trace(fn: Callable, call: Any, operands: list[Any]) -> _Program:
    """`fn(*args, **kwargs)` for `call = (args, kwargs)` with `operands` for its leaves. What is no
    array (a Python number, a string, a function) is passed on as it is."""
    treedef = jax.tree.structure(call, is_leaf=is_weight)
    given = {i: value for i, value in enumerate(operands) if is_tracked(value) or _is_array(value)}
    structure: Any = None

    def flat(*arrays):
        nonlocal structure
        values = dict(zip(given, arrays, strict=True))
        args, kwargs = treedef.unflatten([values.get(i, v) for i, v in enumerate(operands)])
        results, structure = jax.tree.flatten(fn(*args, **kwargs))
        return results

    jaxpr = jax.make_jaxpr(flat)(
        *(plain.shapes(value) if is_tracked(value) else value for value in given.values())
    )
    return _Program(jaxpr, list(given.values()), structure)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _abstract(value: Any) -> Any:
    return plain.shapes(value) if _is_array(value) else value


def _in_argument(path: str) -> str:
    """`0/0/params/kernel`, a leaf of the first argument, as its user knows it: `params/kernel`."""
    return path.split("/", 2)[-1]


def _returned(result: Any, untouched: dict[int, Any]) -> Any:
    if not is_tracked(result):
        return result
    if id(result) not in untouched:
        raise ValueError(
            f"{result.path}: the function returns this weight in another form than it was given. "
            "Return what the function computes; the weights are at hand outside."
        )
    return untouched[id(result)]
