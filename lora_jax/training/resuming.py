"""What a resumed run must have in common with the one that it continues."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.masks import trainable_mask
from lora_jax.training.step import TrainState
from lora_jax.transform import delta_nodes
from lora_jax.weights import PyTree

ROUNDING = 1e-3  # by which frozen leaves may differ that another device type computed


def digest(tree: PyTree) -> str:
    """A name for batches by the names, shapes and bytes of their arrays."""
    found = hashlib.sha256()
    for path, leaf in paths.flatten(tree).items():
        array = np.asarray(leaf)
        found.update(f"{path} {array.shape} {array.dtype}\n".encode() + array.tobytes())
    return found.hexdigest()[:16]


def peek(batches: Any) -> PyTree:
    """The next batch of an iterator with `get_state` and `set_state`, which stays the next."""
    position = batches.get_state()
    batch = next(batches)
    batches.set_state(position)
    return batch


def with_hyperparams_of(given: PyTree, restored: PyTree) -> PyTree:
    """What was restored, with the optimizers' hyperparameters as the caller gave them."""

    def either(path, ours, theirs):
        return ours if "hyperparams" in paths.path_name(path).split("/") else theirs

    return jax.tree_util.tree_map_with_path(either, given, restored)


def require_same_init(
    folder: Path, arms: Sequence[str], given: Sequence[TrainState], restored: Sequence[TrainState]
) -> None:
    """Checks that arms have the seeds and the frozen leaves that they were initialised with: the
    caller's would be ignored otherwise.

    Raises:
      ValueError: naming the arm and the first of what differs.
    """
    for name, ours, theirs in zip(arms, given, restored, strict=True):
        differing = [] if int(ours.seed) == int(theirs.seed) else ["its seed"]
        frozen = _frozen(ours), _frozen(theirs)
        differing += [path for path in frozen[0] if not _close(frozen[0][path], frozen[1][path])]
        if differing:
            raise ValueError(
                f"the checkpoint in {folder} is of another run: arm {name!r} was begun with other "
                f"settings there, as {differing[0]} shows. Choose another --workdir, or go back to "
                "the seed, alpha, settings and initialisation that it was made with."
            )


def _frozen(state: TrainState) -> dict[str, jax.Array]:
    """The leaves that no step moves, of the loss's settings and of the delta."""
    found = paths.flatten({"settings": dict(state.settings)})
    for path, node in delta_nodes(state.delta).items():
        moves = paths.flatten(trainable_mask(node))
        for name, leaf in paths.flatten(node).items():
            if not moves[name] and name.split("/")[0] not in node.statistics:
                found[f"{path}/{name}"] = leaf
    return found


@jax.jit
def _close(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.allclose(one, other, rtol=ROUNDING, atol=ROUNDING * jnp.max(jnp.abs(one), initial=0))
