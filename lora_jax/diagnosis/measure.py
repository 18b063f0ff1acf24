"""What is computed of one target, layer by layer."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.diagnosis import spectra
from lora_jax.layouts import Layout
from lora_jax.methods import DeltaNode, FullNode
from lora_jax.weights import as_matrix, dense_float32, scan_layers

Arrays = dict[str, jax.Array]
STATIC = ("layout", "stack_ndim", "top", "directions")  # arguments of `measured`


def each_layer(function: Callable[..., Any], stack_ndim: int, *trees: Any) -> Any:
    """`function` of every stacked layer of trees of arrays, weights and nodes, one after another:
    a decoded layer is freed before the next."""
    if stack_ndim == 0:
        return function(*trees)

    def one(carry, layer):
        return carry, each_layer(function, stack_ndim - 1, *layer)

    return scan_layers(one, None, trees)[1]


def matrix_node(node: DeltaNode, layout: Layout) -> DeltaNode:
    """The node of the weight's matrix, of a node that may be as the weight itself is."""
    if isinstance(node, FullNode):
        return dataclasses.replace(node, delta=layout.to_matrix(node.delta))
    return node.as_matrix()


def update_of(node: DeltaNode, weight_IO: jax.Array) -> jax.Array:
    """What one layer's node adds to its weight when it is merged: dense, float32."""
    if isinstance(node, FullNode):
        return node.delta.astype(jnp.float32)
    factors = node.factors()
    if factors is None:
        return node.merge(weight_IO) - weight_IO
    with jax.default_matmul_precision("highest"):
        return factors[0] @ factors[1]


@functools.partial(jax.jit, static_argnames=STATIC)
def measured(
    weight: Any,
    node: DeltaNode,
    others: Sequence[DeltaNode],
    *,
    layout: Layout,
    stack_ndim: int,
    top: int,
    directions: int,
) -> tuple[Arrays, list[tuple[jax.Array, jax.Array]]]:
    """Of every layer: the numbers of `TargetDiagnosis` by name, and the overlaps, on the side of
    the inputs and of the outputs, with each of `others`. Nodes are resolved."""

    def one(weight, node, others):
        dense = dense_float32(weight)
        update = _spectrum(node, dense)
        return _numbers(dense, node, update, top), [
            _overlaps(update, _spectrum(other, dense), directions) for other in others
        ]

    nodes = [matrix_node(each, layout) for each in (node, *others)]
    return each_layer(one, stack_ndim, as_matrix(weight, layout), nodes[0], nodes[1:])


def _spectrum(node: DeltaNode, weight_IO: jax.Array) -> spectra.Spectrum:
    factors = node.factors()
    if factors is not None:
        return spectra.of_factors(*factors)
    # Of a difference, the rounding of what it is taken of remains.
    by_difference = not isinstance(node, FullNode)
    noise = 4 * spectra.EPS * jnp.linalg.norm(weight_IO) if by_difference else 0.0
    return spectra.of_matrix(update_of(node, weight_IO), noise)


def _numbers(weight_IO: jax.Array, node: DeltaNode, update: spectra.Spectrum, top: int) -> Arrays:
    numbers = {
        "norm": jnp.linalg.norm(update.s),
        "spectral_norm": update.s[0],
        "weight_norm": jnp.linalg.norm(weight_IO),
        "rank": update.rank,
        "effective_rank": spectra.effective_rank(update.s),
        "amplification": spectra.amplification(update, weight_IO),
        "spectrum": update.s,
    }
    if top == 0:
        return numbers | {"weight_spectral_norm": spectra.largest_value(weight_IO)}
    _, s_K, v_OK = spectra.by_gram(weight_IO)
    tuned = spectra.by_gram(weight_IO + update_of(node, weight_IO))
    u_IT, s_T, v_OT = (side[..., :top] for side in tuned)
    with jax.default_matmul_precision("highest"):
        cosines_T = jnp.max(jnp.abs(v_OK.T @ v_OT), axis=0)
    return numbers | {
        "weight_spectral_norm": jnp.max(s_K),
        "cosines": jnp.where((update.rank == 0) | (s_T == 0), 1, jnp.minimum(cosines_T, 1)),
        "values": s_T,
        "u": u_IT,
        "v": v_OT,
    }


def _overlaps(
    one: spectra.Spectrum, other: spectra.Spectrum, directions: int
) -> tuple[jax.Array, jax.Array]:
    return (
        spectra.overlap(one.u[:, :directions], one.rank, other.u[:, :directions], other.rank),
        spectra.overlap(one.v[:, :directions], one.rank, other.v[:, :directions], other.rank),
    )
