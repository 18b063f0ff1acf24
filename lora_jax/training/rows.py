"""The rows of a batch: the axis along which a step cuts it."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.paths import path_name


def rows_of(batch: Any) -> int:
    """How many rows every array of a batch, a pytree, has on its first axis.

    Raises:
      ValueError: naming the array that has none, or another number than those before it.
    """
    first = None
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        name, shape = path_name(path) or "the batch", jnp.shape(leaf)
        if not shape:
            raise ValueError(
                f"{name} of the batch is a scalar, and a batch is cut along the first axis of "
                "every array: expected rows there."
            )
        first = first or (name, shape[0])
        if shape[0] != first[1]:
            raise ValueError(
                f"a batch is cut along the first axis of every array, but {first[0]} has "
                f"{first[1]} rows there and {name} has {shape[0]}."
            )
    if first is None:
        raise ValueError("the batch holds no arrays.")
    return first[1]
