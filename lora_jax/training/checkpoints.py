"""Checkpoints of what trains, with a fingerprint of what does not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from lora_jax import paths
from lora_jax.fingerprint import fingerprint as fingerprint
from lora_jax.weights import PyTree


def save(
    folder: Path, step: int, states: PyTree, *, identity: Mapping[str, Any], position: Any
) -> None:
    """Writes a checkpoint, whole or not at all, and keeps the newest two.

    Of several processes all take part, with global arrays: each writes the slices that it holds.

    Args:
      folder: where a run's checkpoints lie.
      step: its number.
      states: the pytree of arrays that trains.
      identity: what a later run must agree with to restore it, such as the base's fingerprint.
      position: whatever JSON-like value is needed to go on, such as the data's position.
    """
    record = {"identity": dict(identity), "leaves": _leaves(states), "position": position}
    with _checkpointer(folder) as checkpointer:
        checkpointer.save(step, states, custom_metadata=record, overwrite=True)


def restore(
    folder: Path, like: PyTree, *, identity: Mapping[str, Any]
) -> tuple[int, PyTree, Any] | None:
    """The newest checkpoint as `(step, states, position)`, or None where there is none yet.

    The arrays are placed as those of `like` are, whatever the number of devices and processes that
    wrote them; each process reads its slices.

    Raises:
      ValueError: if it was made over another base, for other arms or another method, or is damaged.
    """
    with _checkpointer(folder) as checkpointer:
        latest = checkpointer.latest
        if latest is None:
            return None
        try:
            record = checkpointer.metadata(latest.step).custom_metadata
            ours = {**identity, **_leaves(like)}
            theirs = {**record["identity"], **record["leaves"]}
        except Exception as error:
            raise _damaged(folder, latest.step, error) from error
        for name in sorted({*ours, *theirs}, key=lambda name: (name not in identity, name)):
            if ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"the checkpoint in {folder} is of another run: {name} is {theirs.get(name)} "
                    f"there and {ours.get(name)} here. Choose another --workdir, or go back to the "
                    "base, arms and method that it was made with."
                )
        try:
            states = checkpointer.load(latest.step, jax.tree.map(_abstract, like))
        except Exception as error:
            raise _damaged(folder, latest.step, error) from error
    return latest.step, states, record["position"]


def _checkpointer(folder: Path) -> ocp.training.Checkpointer:
    newest = ocp.training.preservation_policies.LatestN(2)
    return ocp.training.Checkpointer(folder.resolve(), preservation_policy=newest)


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _leaves(tree: PyTree) -> dict[str, str]:
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in paths.flatten(tree).items()}


def _damaged(folder: Path, step: int, error: Exception) -> ValueError:
    return ValueError(
        f"the checkpoint {folder / str(step)} is damaged ({type(error).__name__}). Delete that "
        "folder to go on from the one before, or choose another --workdir."
    )
