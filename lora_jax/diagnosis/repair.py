"""Intruder dimensions scaled: a delta from a delta."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.data_inits import as_plain_lora
from lora_jax.diagnosis.measure import each_layer, matrix_node, update_of
from lora_jax.layouts import Layout
from lora_jax.methods import (
    DeltaNode,
    DoRANode,
    FullNode,
    IA3BiasNode,
    LoRANode,
    LowRank,
    VeRANode,
    VeRAProjection,
)
from lora_jax.products import Rows
from lora_jax.transform import Delta, delta_nodes
from lora_jax.weights import PyTree, as_matrix, dense_float32, is_weight


def repaired(
    base: PyTree,
    delta: Delta,
    found: Mapping[str, Any],
    layouts: Mapping[str, Layout],
    factor: float,
) -> Delta:
    """See `Diagnosis.repair`; `found` are the `Intruders` by path."""
    if not (isinstance(factor, int | float) and math.isfinite(factor) and factor >= 0):
        raise ValueError(
            f"factor={factor!r}: expected a number of at least 0; 1 changes nothing, 0 removes "
            "intruder dimensions."
        )
    if any(intruders is None for intruders in found.values()):
        raise ValueError("intruders were not looked for: call diagnose with top=10, say.")
    flat = paths.flatten(base, is_leaf=is_weight)
    before = delta_nodes(delta)
    nodes = dict(before)
    for path, intruders in found.items():
        if factor == 1 or not intruders.is_new.any():
            continue
        a, b = _correction(intruders, factor)
        with paths.naming(path):
            node = before[path].resolve(flat[path], before)
            nodes[path] = _added(node, flat[path], layouts[path], a, b)
    return paths.nest(_without_orphans(nodes, before, flat))


def _correction(intruders: Any, factor: float) -> tuple[jax.Array, jax.Array]:
    """`a [stack..., d_in, n]` and `b [stack..., n, d_out]`, whose product is to be added; n is the
    number of intruders in the layer that has most."""
    n = int(intruders.count.max())
    order = np.argsort(~intruders.is_new, axis=-1, kind="stable")[..., :n]
    sizes = (factor - 1) * np.where(intruders.is_new, intruders.values, 0)
    a = np.take_along_axis(intruders.u * sizes[..., None, :], order[..., None, :], axis=-1)
    b = np.take_along_axis(intruders.v, order[..., None, :], axis=-1)
    return jnp.asarray(a, jnp.float32), jnp.asarray(np.swapaxes(b, -1, -2), jnp.float32)


def _added(node: DeltaNode, weight: Any, layout: Layout, a: jax.Array, b: jax.Array) -> DeltaNode:
    """The node with `a @ b` added to the merged weight."""
    stack, d_in, d_out = layout.split(weight.shape)
    if isinstance(node, DoRANode):
        return _dora_added(node, weight, layout, a, b)
    if not isinstance(node, LowRank) and _has_factors(node, layout, len(stack)):
        node = _as_lora(node, layout, stack, d_in, d_out)
    if isinstance(node, LowRank):
        plain: Any = delta_nodes(as_plain_lora({"node": node}))["node"]
        return _more_rank(plain, a, b / _nonzero(plain.scale)[..., None, None])

    def dense(weight, node, a, b):
        with jax.default_matmul_precision("highest"):
            return update_of(node, dense_float32(weight)) + a @ b

    matrices = as_matrix(weight, layout), matrix_node(node, layout), a, b
    update = jax.jit(lambda *trees: each_layer(dense, len(stack), *trees))(*matrices)
    return FullNode(delta=layout.from_matrix(update, weight.shape))


def _has_factors(node: DeltaNode, layout: Layout, stack_ndim: int) -> bool:
    def one(node):
        return node.factors()

    matrix = matrix_node(node, layout)
    return jax.eval_shape(lambda node: each_layer(one, stack_ndim, node), matrix) is not None


def _as_lora(node: DeltaNode, layout: Layout, stack, d_in, d_out) -> LoRANode:
    """The same update by its factors."""
    one = lambda node: node.factors()  # noqa: E731
    a, b = each_layer(one, len(stack), matrix_node(node, layout))
    return LoRANode(
        a=a.reshape(*stack, *d_in, a.shape[-1]),
        b=b.reshape(*stack, b.shape[-2], *d_out),
        scale=jnp.ones(stack, jnp.float32),
        dropout=node.dropout,
        layout=layout,
    )


def _more_rank(node: Any, a: jax.Array, b: jax.Array) -> Any:
    """A node of factors with these columns of `a` and rows of `b` behind its own."""
    stack, n = node.stack_ndim, a.shape[-1]
    a = a.reshape(*node.a.shape[:-1], n)
    b = b.reshape(*node.b.shape[:stack], n, *node.b.shape[stack + 1 :])
    return dataclasses.replace(
        node,
        a=jnp.concatenate([node.a.astype(jnp.float32), a], axis=-1),
        b=jnp.concatenate([node.b.astype(jnp.float32), b], axis=stack),
    )


def _dora_added(
    node: DoRANode, weight: Any, layout: Layout, a: jax.Array, b: jax.Array
) -> DoRANode:
    """Columns `c V + a b = c (V + a b / c)` with `c = m / |V|`: factors of more rank, and the
    magnitudes that keep every c."""

    def one(node, weight, a, b):
        left = lambda node: Rows().left(node.a.astype(jnp.float32), weight)  # noqa: E731
        c = node.factor(left(node))
        more = _more_rank(node, a, b / (_nonzero(c)[None] * _nonzero(node.scale)))
        unit = dataclasses.replace(more, magnitude=jnp.ones_like(node.magnitude))
        return more.b, c / unit.factor(left(unit))

    stack = node.stack_ndim
    matrices = matrix_node(node, layout), as_matrix(weight, layout), a, b
    rows, magnitude = jax.jit(lambda *trees: each_layer(one, stack, *trees))(*matrices)
    wide = _more_rank(node, a, b)
    return dataclasses.replace(
        wide, b=rows.reshape(wide.b.shape), magnitude=magnitude.reshape(node.magnitude.shape)
    )


def _without_orphans(
    nodes: dict[str, DeltaNode], before: Mapping[str, DeltaNode], flat: Mapping[str, Any]
) -> dict[str, DeltaNode]:
    """Without what only replaced nodes read: a projection that no VeRA shares, the factor of a
    bias whose IA3 is a Full now."""
    used = {node.path for node in nodes.values() if isinstance(node, VeRANode)}
    kept = {}
    for path, node in nodes.items():
        if isinstance(node, VeRAProjection) and path not in used:
            continue
        if isinstance(node, IA3BiasNode) and nodes[node.of] is not before[node.of]:
            bias = dense_float32(flat[path])
            node = FullNode(delta=node.resolve(flat[path], before).merge(bias) - bias)
        kept[path] = node
    return kept


def _nonzero(values: jax.Array) -> jax.Array:
    """Where a scale is zero there is no update, and nothing is added: divided by 1."""
    return jnp.where(values == 0, 1, values)
