"""The function transform for models that know nothing of us."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.layouts import Layouts
from lora_jax.tracing import plain
from lora_jax.tracing.axes import Axes
from lora_jax.tracing.interpreter import evaluate
from lora_jax.tracing.lazy import Lazy
from lora_jax.tracing.probe import Probe, Uses, layout_of
from lora_jax.tracing.reasons import reason_of
from lora_jax.tracing.tracked import RefusedError, is_tracked
from lora_jax.weights import PyTree, is_weight


def adapt(fn: Callable) -> Callable:
    """`fn`, unchanged, for weights of any type where it took arrays: `adapt(fn)(bind(base, delta),
    *args)` is `fn(merge(base, delta), *args)`, in value and in the gradient of the delta.

    `fn` is traced, and its jaxpr evaluated with adapted and quantised weights in place; the dense
    adapted weight is never built. Where no argument holds such a weight, `fn` itself is called.
    What happens to a weight depends on the operation:

    =====================================================  ===========
    einsum, matmul: contracted with an activation          applied
    batched einsum over stacked weights (experts)          applied
    convolution: any space, stride, dilation, layout       applied
    convolution in groups, or of stacked weights           applied
    transposed convolution                                 applied
    ragged_dot: rows sorted by expert                      applied
    sum over stacked weights, each with its activation     applied
    lookup of rows in every mode, slices of rows           applied
    tied table: rows, and its transpose as output head     applied
    transpose, swapaxes, moveaxis                          followed
    reshape within one side of the matrix                  followed
    cast, stop_gradient, copies, barriers, constraints     followed
    parts of a side: split, slice, index                   followed
    parts of a side as layers (absorbed attention)         followed
    concatenation, stack and padding of weights            followed
    layers of a stack: index, slice, split, unstack        followed
    experts by an array of indices, in every mode          followed
    times a scalar, or a vector along one side             followed
    jit                                                    walked into
    checkpoint                                             walked into
    scan over stacked weights                              walked into
    while_loop, fori_loop                                  walked into
    cond, switch                                           walked into
    vmap over stacked weights                              walked into
    shard_map                                              walked into
    custom_jvp, custom_vjp that take a weight              walked into
    pallas_call, custom_vjp and others without a weight    as they are
    pallas_call that takes a weight                        ValueError
    convolution in groups of its batch                     ValueError
    elementwise operation, sum or norm of a weight         ValueError
    cast of a weight to integers                           ValueError
    reversal, padding between entries, repetition          ValueError
    select, write into a weight, lookup of entries         ValueError
    lookup or slice that differs from layer to layer       ValueError
    reshape that mixes both sides of the matrix            ValueError
    reshape that splits a side where it was not            ValueError
    scan along a side                                      ValueError
    contraction with no side                               ValueError
    product of two weights                                 ValueError
    weight out of a branch, a scan or a custom rule        ValueError
    loop that carries a weight and changes its form        ValueError
    =====================================================  ===========

    It composes with jit, grad, vmap, checkpoint, scan, shard_map, pmap, eval_shape and itself. A
    custom gradient of a function that takes a weight is kept, in reverse mode, and gives the dense
    weight a gradient, as it does in `fn`. Out of bounds, slices and lookups read what they read in
    `fn`. Forward mode passes wherever the delta's own rule has it (LoRA's product with B has none).
    A sharding constraint on a weight is dropped: shard the base. A part of a side (rows of a table,
    one of several fused projections) is applied like a weight, and built only where the program
    reads it as an array. With a kernel `[space..., in, out]`, A is the same convolution with r
    outputs and B is 1 x 1; in groups, each group has its r / groups. By group sizes, each expert
    has its own factors.

    Args:
      fn: any function of pytrees. Leaves that are not arrays (numbers, strings, functions) are
        passed on unchanged.

    Returns:
      A function with the same signature.

    Raises:
      ValueError: from the call, where the program would build a dense weight, contracts other axes
        than its delta was made for, or returns a weight that it has changed; names
        the path, the primitive, the line and the ways out.
    """

    def adapted(*args, **kwargs):
        leaves = paths.flatten((args, kwargs), is_leaf=is_weight)
        if not any(is_weight(leaf) for leaf in leaves.values()):
            return fn(*args, **kwargs)
        operands = [_operand(path, leaf) for path, leaf in leaves.items()]
        program = _trace(fn, (args, kwargs), operands)
        try:
            results = evaluate(program.jaxpr, program.operands)
            results = [value.settled() if is_tracked(value) else value for value in results]
        except RefusedError as error:
            raise ValueError(error.message()) from error
        untouched = dict(zip(map(id, operands), leaves.values(), strict=True))
        return program.structure.unflatten([_returned(r, untouched) for r in results])

    return adapted


def infer_layouts(fn: Callable, params: PyTree, *args, **kwargs) -> Layouts:
    """How `fn(params, *args, **kwargs)` uses each floating-point leaf of `params`.

    `fn` is traced, never run: arrays and `jax.ShapeDtypeStruct`s both work.

    Args:
      fn: any function whose first argument is `params`, such as a model's `apply`.
      params: the pytree of weights.
      *args: the rest of a call, such as a batch.
      **kwargs: likewise.

    Returns:
      `{path: Layout}` for `lora_transform(..., layouts=...)`: which axes of a leaf are contracted
      with an activation, which ones it gains, and which are stacked (scanned, mapped or indexed
      over). A table that is read both by rows and by its transpose gets the layout of the rows.
      None for a leaf that nothing is contracted with: a norm's scale, a bias. `reasons` of the
      result has for each of these what is done with it, and the line.

    Raises:
      ValueError: for a leaf that is used as two different matrices.
    """
    uses = Uses()

    def watched(path, leaf):
        if not (_is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)):
            return leaf
        uses.of[path] = []
        return Probe(_abstract(leaf), path, Axes.of_leaf(leaf.shape), uses)

    leaves = paths.flatten(params, is_leaf=is_weight)
    others = jax.tree.leaves((args, kwargs), is_leaf=is_weight)
    probes = [watched(path, leaf) for path, leaf in leaves.items()]
    program = _trace(fn, ((params, *args), kwargs), [*probes, *map(_abstract, others)])

    def walk(operands):
        results = [value for value in evaluate(program.jaxpr, operands) if isinstance(value, Probe)]
        return [value.read() for value in results if value.table]

    jax.eval_shape(walk, program.operands)
    layouts = {path: layout_of(path, leaves[path].shape, of) for path, of in uses.of.items()}
    reasons = {path: reason_of(uses.of[path]) for path, layout in layouts.items() if layout is None}
    return Layouts(layouts, reasons)


@dataclasses.dataclass(frozen=True)
class _Program:
    """A traced call: its jaxpr, the operands that it takes, the structure of its results."""

    jaxpr: Any
    operands: list[Any]
    structure: Any


def _trace(fn: Callable, call: Any, operands: list[Any]) -> _Program:
    """`fn(*args, **kwargs)` for `call = (args, kwargs)` with `operands` for its leaves. What is not
    an array (a Python number, a string, a function) is passed on unchanged."""
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
    return plain.shapes(_as_jax(value)) if _is_array(value) else value


def _as_jax(value: Any) -> Any:
    """NumPy's float64 and int64 are float32 and int32 to JAX."""
    return jnp.asarray(value) if isinstance(value, np.ndarray | np.generic) else value


def _operand(path: str, leaf: Any) -> Any:
    if is_weight(leaf):
        return Lazy.of_leaf(_in_argument(path), leaf)
    return _as_jax(leaf)


def _in_argument(path: str) -> str:
    """`0/0/params/kernel`, a leaf of the first argument, as users name it: `params/kernel`."""
    return path.split("/", 2)[-1]


def _returned(result: Any, untouched: dict[int, Any]) -> Any:
    if not is_tracked(result):
        return result
    if id(result) not in untouched:
        raise ValueError(
            f"{result.path}: the function returns this weight transposed, cast, sliced or "
            "reshaped. Return what the function computes; the weights are at hand outside."
        )
    return untouched[id(result)]
