"""Initialisation from data: EVA and LoftQ; and PiSSA and OLoRA as plain LoRA."""

import dataclasses
from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp

from lora_jax import paths
from lora_jax.methods import DeltaNode, LoRANode
from lora_jax.methods.decompositions import each_layer, truncated_svd
from lora_jax.transform import Delta, delta_nodes
from lora_jax.weights import PyTree, Weight, as_matrix, is_weight


def eva_start(delta: Delta, covariances: Mapping[str, jax.Array]) -> Delta:
    """The initial delta with every `a` set to the principal directions of its inputs: EVA (Paischer
    et al. 2024, arXiv:2410.07170). The largest come first. A layer takes as many as its own rank;
    its other columns stay zero.

    The paper takes the ranks from
    `allocate_ranks(input_importance(covariances, rank=...), budget=...)`.

    Args:
      delta: of LoRA; nodes of other methods are returned as they are.
      covariances: `{path: [stack..., d_in, d_in]}`, from `input_covariances`.

    Raises:
      ValueError: where a path is adapted by LoRA but has no covariance, or one of another shape, or
        has an init of its own already (PiSSA, OLoRA).
    """
    nodes: dict[str, DeltaNode] = dict(delta_nodes(delta))
    for path, node in nodes.items():
        if not isinstance(node, LoRANode):
            continue
        _require_no_weight_init(path, node, "eva_start")
        if path not in covariances:
            raise ValueError(
                f"{path}: no covariance of its inputs is given: name it among the targets of "
                "input_covariances."
            )
        a, covariance = node.as_matrix().a, covariances[path]
        expected = (*a.shape[:-1], a.shape[-2])
        if covariance.shape != expected:
            raise ValueError(
                f"{path}: the covariance of its inputs has shape {covariance.shape}, expected "
                f"{expected}. Is it of this model?"
            )
        vectors = each_layer(lambda matrix: jnp.linalg.eigh(matrix)[1], covariance)
        directions = vectors[..., ::-1][..., : node.rank]
        a = jnp.where(_in_use(node)[..., None, :], directions, 0)
        nodes[path] = dataclasses.replace(node, a=a.reshape(node.a.shape))
    return paths.nest(nodes)


def loftq_start(
    params: PyTree, base: PyTree, delta: Delta, *, iterations: int = 1
) -> tuple[PyTree, Delta]:
    """A quantised base and a LoRA delta that together come closest to the original weights: LoftQ
    (Li et al. 2023, arXiv:2310.08659, algorithm 1).

    In turn, `q = quantise(w - scale * a @ b)` in the format that the base has, and `scale * a @ b`
    the best approximation of `w - q` of the delta's rank. With one iteration q is the base.

    The delta corrects the error of this base alone and must not be bound to another: its nodes
    record that (`own_base`), and `interop.peft.save_adapter` does not write them as an adapter of
    the original.

    Args:
      params: the original weights, not quantised.
      base: the same tree, quantised where it is to be.
      delta: an initial LoRA delta; each layer keeps its own rank. Paths whose base is an array, or
        whose node is another method's, are left as they are.
      iterations: how many times both steps are taken, at least 1.

    Returns:
      `(base, delta)`, of the structures and shapes given but for `own_base`.

    Raises:
      ValueError: where `params` lacks a path of the delta whose base is quantised, or has it in
        another shape; for a node with an init of its own (PiSSA, OLoRA); for no iteration.
    """
    if iterations < 1:
        raise ValueError(f"loftq_start(iterations={iterations!r}): expected at least 1.")
    flat = paths.flatten(base, is_leaf=is_weight)
    original = paths.flatten(params)
    nodes: dict[str, DeltaNode] = dict(delta_nodes(delta))
    for path, node in nodes.items():
        weight = flat.get(path)
        if not isinstance(node, LoRANode) or not isinstance(weight, Weight):
            continue
        _require_no_weight_init(path, node, "loftq_start")
        if path not in original or original[path].shape != weight.shape:
            found = f"as {original[path].shape}" if path in original else "not at all"
            raise ValueError(
                f"{path}: the delta adapts it, of shape {weight.shape}, and params, the original "
                f"weights, have it {found}."
            )
        target = node.layout.to_matrix(original[path]).astype(jnp.float32)
        in_use = _in_use(node)
        for turn in range(iterations):
            if turn:
                rest = original[path].astype(jnp.float32) - node.update(weight.shape)
                weight = weight.requantized(rest)
            node = _fitted(node, target, as_matrix(weight, node.layout), in_use)
        nodes[path] = dataclasses.replace(node, own_base="loftq")
        flat[path] = weight
    tree = jax.tree.unflatten(jax.tree.structure(base, is_leaf=is_weight), flat.values())
    return tree, paths.nest(nodes)


def as_plain_lora(delta: Delta) -> Delta:
    """The same delta by factors alone, as other libraries have LoRA.

    A node that began as PiSSA or OLoRA adds `scale * (a @ b - a0 @ b0)`, which is a plain adapter
    of twice the rank: `[a, a0] @ [b; -b0]`, with `a [stack..., contracted..., 2 r]` and
    `b [stack..., 2 r, output...]`. All other nodes are returned as they are.
    """

    def plain(node: DeltaNode) -> DeltaNode:
        if not isinstance(node, LoRANode) or node.a0 is None:
            return node
        a = jnp.concatenate([node.a, node.a0], axis=-1)
        b = jnp.concatenate([node.b, -cast(jax.Array, node.b0)], axis=node.stack_ndim)
        return dataclasses.replace(node, a=a, b=b, a0=None, b0=None)

    return paths.nest({path: plain(node) for path, node in delta_nodes(delta).items()})


def _in_use(node: LoRANode) -> jax.Array:
    """`[stack..., r]`: which columns of an initial `a` are within a layer's own rank, as those that
    are not zero."""
    return jnp.any(node.as_matrix().a != 0, axis=-2)


def _require_no_weight_init(path: str, node: LoRANode, name: str) -> None:
    if node.a0 is not None:
        raise ValueError(
            f"{path}: {name} chooses factors of its own, and this node was initialised from the "
            "weight. Make the delta with LoRA(init='kaiming')."
        )


def _fitted(node: LoRANode, target: jax.Array, weight: jax.Array | Weight, in_use) -> LoRANode:
    """The node whose update is nearest to `target - weight`, by matrix, of each layer's rank."""

    def fit(quantised, target, scale, in_use):
        u, s, vt = truncated_svd(target - quantised, node.rank)
        root = jnp.where(in_use, jnp.sqrt(s / jnp.where(scale == 0, 1, scale)), 0)
        return u * root[None], root[:, None] * vt

    a, b = each_layer(fit, weight, target, node.scale, in_use)
    return dataclasses.replace(node, a=a.reshape(node.a.shape), b=b.reshape(node.b.shape))
