"""What an optimizer may move: the factors of a delta, never the base, a scale or a key."""

import dataclasses
from typing import Any

import jax
import optax

from lora_jax.methods import DeltaNode
from lora_jax.weights import Adapted, PyTree


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
    tx: optax.GradientTransformation, delta: PyTree
) -> optax.GradientTransformationExtraArgs:
    """`tx` on the trained leaves of `delta` and on nothing else.

    All else gets a zero update, keeps no optimizer state, and takes no part in what `tx` computes
    across leaves, such as a clip by global norm. (A bare `optax.masked(tx, mask)` would pass the
    raw gradients of masked-out leaves on as updates.)

    Args:
      tx: any optax transformation.
      delta: a delta, or a tree of bound weights; only its structure counts.
    """
    labels = jax.tree.map(lambda trains: "train" if trains else "freeze", trainable_mask(delta))
    return optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)
