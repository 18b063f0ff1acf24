"""Muon over the leaves of a delta: which of their axes are a matrix."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from lora_jax import paths, schema
from lora_jax.methods import DeltaNode, Extra, FullNode
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
        one = functools.partial(_axes, path, node)
        return jax.tree.map(one, node, schema.leaves_of(node))

    is_node = lambda leaf: isinstance(leaf, DeltaNode)  # noqa: E731
    return jax.tree_util.tree_map_with_path(of_node, tree, is_leaf=is_node)


def _axes(path: str, node: DeltaNode, array: Any, leaf: schema.Leaf) -> MuonDimensionNumbers | None:
    """A leaf of two groups of axes beside the stack is a matrix from the first to the second."""
    if isinstance(node, FullNode):
        if jnp.ndim(array) < 2:
            return None
        raise ValueError(
            f"{path}: Muon cannot move a Full delta of shape {tuple(array.shape)}, which does not "
            "say which axes are stacked layers and which the matrix. Choose another optimizer, "
            "such as adamw, or a method with factors."
        )
    sides = schema.split(leaf, tuple(jnp.shape(array)), node.layout)
    counts = [len(dims) for axis, dims in sides if axis != "stack"]
    if len(counts) != 2 or isinstance(node, Extra):
        return None
    rows, columns = counts
    return MuonDimensionNumbers(tuple(range(-rows - columns, -columns)), tuple(range(-columns, 0)))
