"""What an optimizer may move: the factors of a delta, never the base, a scale or a key."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.adapted import Adapted
from lora_jax.methods import DeltaNode, LowRank
from lora_jax.methods.decompositions import each_layer
from lora_jax.paths import path_name
from lora_jax.weights import PyTree


def trainable_mask(tree: PyTree) -> PyTree:
    """A bool for every leaf: True on what trains (A and B of LoRA), False on all else.

    Args:
      tree: a delta, or a tree of bound weights, in which everything but the trained leaves of the
        `Adapted` ones is False.
    """

    def mask(node: Any) -> Any:
        if isinstance(node, DeltaNode):
            return node.trainable()
        if isinstance(node, Adapted):
            frozen = jax.tree.map(lambda _: False, dataclasses.replace(node, node=None))
            return dataclasses.replace(frozen, node=node.node.trainable())
        return False

    return jax.tree.map(mask, tree, is_leaf=lambda x: isinstance(x, DeltaNode | Adapted))


def mask_optimizer(
    tx: optax.GradientTransformation, delta: PyTree, *, b_ratio: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    """`tx` on the trained leaves of `delta` and on nothing else.

    All else gets a zero update, keeps no optimizer state, and takes no part in what `tx` computes
    across leaves, such as a clip by global norm. (A bare `optax.masked(tx, mask)` would pass the
    raw gradients of masked-out leaves on as updates.)

    Args:
      tx: any optax transformation.
      delta: a delta, or a tree of bound weights; only its structure counts.
      b_ratio: LoRA+: how many times A's learning rate B's is. See `scale_b`.
    """
    labels = jax.tree.map(lambda trains: "train" if trains else "freeze", trainable_mask(delta))
    if b_ratio != 1:
        tx = optax.chain(tx, scale_b(b_ratio))
    return optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)


def scale_b(ratio: float) -> optax.GradientTransformation:
    """Multiplies the updates of every factor `b`, and of DoRA's magnitudes, by `ratio`.

    Behind an optimizer it sets the ratio of B's learning rate to A's, decoupled weight decay
    included: LoRA+ (Hayou et al. 2024, arXiv:2402.12354), in PEFT's grouping. It can be part of
    the `tx` of a training step: `optax.chain(adamw, scale_b(16))`.
    """

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        del params

        def scaled(path, leaf):
            return leaf * ratio if path_name(path[-1:]) in ("b", "magnitude") else leaf

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def project_b() -> optax.GradientTransformation:
    """LoRA-FA's gradient of `b`: `(a^T a)^-1 g / scale^2` where `a` is frozen (`train_a=False`),
    in LoRA and DoRA. All other leaves keep their gradient.

    Of all updates that move `b` alone, this comes closest to the gradient of the whole weight
    (Zhang et al. 2023, arXiv:2308.03303, section 3; PEFT adds 1e-8 to the diagonal, and so does
    this). It reads the frozen factors, so its update must be given the delta as `params`, and it
    comes before the mask: `optax.chain(project_b(), mask_optimizer(tx, delta))`.

    The update raises ValueError without `params`, or where they hold no frozen `a`.
    """

    def projects(node: Any) -> bool:
        return isinstance(node, LowRank) and not node.train_a

    def corrected(gradient: Any, node: Any) -> Any:
        if not projects(node):
            return gradient
        a, b = node.as_matrix().a, gradient.as_matrix().b
        with jax.default_matmul_precision("highest"):
            gram = jnp.matmul(jnp.swapaxes(a, -1, -2), a)
        gram = gram + jnp.broadcast_to(1e-8 * jnp.eye(node.rank), gram.shape)
        square = jnp.where(node.scale == 0, 1, node.scale**2)[..., None, None]
        b = each_layer(jnp.linalg.solve, gram, b) / square
        return dataclasses.replace(gradient, b=b.reshape(gradient.b.shape))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        is_pair = lambda leaf: isinstance(leaf, LowRank)  # noqa: E731
        found = [node for node in jax.tree.leaves(params, is_leaf=is_pair) if projects(node)]
        if not found or any(jax.tree.leaves(node.a) == [] for node in found):
            raise ValueError(
                "project_b found no frozen factor a in params, neither a LoRA's nor a DoRA's. Give "
                "its update the delta, made with train_a=False, and put it in front of the mask: "
                "optax.chain(project_b(), mask_optimizer(tx, delta))."
            )
        return jax.tree.map(corrected, updates, params, is_leaf=is_pair), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
