"""Where a delta starts, beyond what a method draws: EVA, LoftQ, and the way back from PiSSA."""

import dataclasses
from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp

from lora_jax import paths
from lora_jax.methods import DeltaNode, LowRank
from lora_jax.methods.decompositions import each_layer, truncated_svd
from lora_jax.transform import Delta, delta_nodes
from lora_jax.weights import PyTree, Weight, as_matrix, is_weight


def eva_start(delta: Delta, covariances: Mapping[str, jax.Array]) -> Delta:
    """The fresh delta with every `a` set to the principal directions of its inputs: EVA (Paischer
    et al. 2024, arXiv:2410.07170). The largest come first; padding to a larger rank stays zero.

    With `allocate_ranks(input_importance(covariances, rank=...), budget=...)` for the ranks.

    Args:
      delta: of LoRA; nodes of other methods are returned as they are.
      covariances: `{path: [stack..., d_in, d_in]}`, from `input_covariances`.

    Raises:
      ValueError: where a path is adapted by LoRA but has no covariance.
    """
    nodes: dict[str, DeltaNode] = dict(delta_nodes(delta))
    for path, node in nodes.items():
        if not isinstance(node, LowRank):
            continue
        if path not in covariances:
            raise ValueError(
                f"{path}: no covariance of its inputs is given: name it among the targets of "
                "input_covariances."
            )
        vectors = each_layer(lambda matrix: jnp.linalg.eigh(matrix)[1], covariances[path])
        directions = vectors[..., ::-1][..., : node.rank]
        in_use = jnp.any(node.a != 0, axis=-2, keepdims=True)
        nodes[path] = dataclasses.replace(node, a=jnp.where(in_use, directions, 0))
    return paths.nest(nodes)


def loftq_start(
    params: PyTree, base: PyTree, delta: Delta, *, iterations: int = 1
) -> tuple[PyTree, Delta]:
    """A quantised base and a LoRA delta that together come closest to the original weights: LoftQ
    (Li et al. 2023, arXiv:2310.08659, algorithm 1).

    In turn, `q = quantise(w - scale * a @ b)` in the format that the base has, and `scale * a @ b`
    the best approximation of `w - q` of the delta's rank. With one iteration q is the base.

    Args:
      params: the original weights, not quantised.
      base: the same tree, quantised where it is to be.
      delta: a fresh LoRA delta, of one rank in all layers of a path. Paths whose base is an array,
        or whose node is another method's, are left as they are.
      iterations: how many times both steps are taken, at least 1.

    Returns:
      `(base, delta)`, of the structures and shapes given.

    Raises:
      ValueError: where `params` lacks a path of the delta whose base is quantised.
    """
    flat = paths.flatten(base, is_leaf=is_weight)
    original = paths.flatten(params)
    nodes: dict[str, DeltaNode] = dict(delta_nodes(delta))
    for path, node in nodes.items():
        weight = flat.get(path)
        if not isinstance(node, LowRank) or not isinstance(weight, Weight):
            continue
        if path not in original:
            raise ValueError(
                f"{path}: the delta adapts it, and params, the original weights, lack it."
            )
        target = node.layout.to_matrix(original[path]).astype(jnp.float32)
        for turn in range(iterations):
            if turn:
                rest = original[path].astype(jnp.float32) - node.update(weight.shape)
                weight = weight.requantized(rest)
            node = _fitted(node, target, as_matrix(weight, node.layout))
        nodes[path], flat[path] = node, weight
    tree = jax.tree.unflatten(jax.tree.structure(base, is_leaf=is_weight), flat.values())
    return tree, paths.nest(nodes)


def as_plain_lora(delta: Delta) -> Delta:
    """The delta without the factors that PiSSA and OLoRA took from the weights: `scale * (a @ b -
    a0 @ b0)` is a plain adapter of twice the rank, `[a, a0] @ [b; -b0]`.

    Returns:
      A delta with `a [stack..., contracted..., 2 r]` and `b [stack..., 2 r, output...]` where a
      node has `a0` and `b0`; other nodes as they are.
    """

    def plain(node: DeltaNode) -> DeltaNode:
        if not isinstance(node, LowRank) or node.a0 is None:
            return node
        a = jnp.concatenate([node.a, node.a0], axis=-1)
        b = jnp.concatenate([node.b, -cast(jax.Array, node.b0)], axis=node.stack_ndim)
        return dataclasses.replace(node, a=a, b=b, a0=None, b0=None)

    return paths.nest({path: plain(node) for path, node in delta_nodes(delta).items()})


def _fitted(node: LowRank, target: jax.Array, weight: jax.Array | Weight) -> LowRank:
    """The node whose update is nearest to `target - weight`, by matrix."""

    def fit(quantised, target, scale):
        u, s, vt = truncated_svd(target - quantised, node.rank)
        root = jnp.sqrt(s / scale)
        return u * root[None], root[:, None] * vt

    a, b = each_layer(fit, weight, target, node.scale)
    return dataclasses.replace(node, a=a.reshape(node.a.shape), b=b.reshape(node.b.shape))
