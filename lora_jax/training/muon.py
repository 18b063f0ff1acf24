"""Muon over the leaves of a delta: which of their axes are a matrix."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from lora_jax import paths
from lora_jax.methods import Behind, DeltaNode, DenseDelta, Fused
from lora_jax.weights import PyTree


def muon(**settings: Any) -> optax.GradientTransformation:
    """The direction of `optax.contrib.muon`, of any settings but its rates and decays.

    Each layer's matrices are orthogonalised by themselves: the factors `a [d_in, r]` and
    `b [r, d_out]` of LoRA, DoRA and AdaLoRA, a bottleneck's `down` and `up`, a fusion's
    projections. All else (magnitudes, vectors, biases, prompts, prefixes) is moved by Adam, at the
    same rate.

    Raises:
      ValueError: naming the path, for a `Full` delta of more than one axis, which does not say
        which axes are stacked layers.
    """
    # A rate of -1 is the direction itself: optax turns its sign.
    return optax.contrib.muon(-1.0, muon_weight_dimension_numbers=matrix_axes, **settings)


def matrix_axes(tree: PyTree) -> PyTree:
    """A tree like a delta, or its gradient, with the axes of each matrix; None for other leaves.

    Of arrays that are in no delta, those of two axes are matrices.
    """

    def of_node(key_path, node):
        if not isinstance(node, DeltaNode):
            return MuonDimensionNumbers() if jnp.ndim(node) == 2 else None
        path = paths.path_name(key_path)
        return jax.tree_util.tree_map_with_path(lambda at, leaf: _axes(path, node, at, leaf), node)

    is_node = lambda leaf: isinstance(leaf, DeltaNode)  # noqa: E731
    return jax.tree_util.tree_map_with_path(of_node, tree, is_leaf=is_node)


def _axes(path: str, node: DeltaNode, at: Any, leaf: Any) -> MuonDimensionNumbers | None:
    name = paths.path_name(at[-1:])
    contracted, output = len(node.layout.contracted), len(node.layout.output)
    if isinstance(node, DenseDelta):
        if jnp.ndim(leaf) < 2:
            return None
        raise ValueError(
            f"{path}: Muon cannot move a Full delta of shape {tuple(leaf.shape)}, which does not "
            "say which axes are stacked layers and which the matrix. Choose another optimizer, "
            "such as adamw, or a method with factors."
        )
    if isinstance(node, Fused) and name in ("query", "key", "value"):
        return MuonDimensionNumbers((-2,), (-1,))
    if name in ("a", "down"):
        behind = isinstance(node, Behind) and not node.parallel
        read = output if behind else contracted
        return MuonDimensionNumbers(tuple(range(-1 - read, -1)), (-1,))
    if name in ("b", "up"):
        return MuonDimensionNumbers((-1 - output,), tuple(range(-output, 0)))
    return None
