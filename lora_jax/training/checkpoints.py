"""Checkpoints of the trained state, with a fingerprint of the frozen base."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from lora_jax import paths
from lora_jax.fingerprint import fingerprint as fingerprint
from lora_jax.methods import DeltaNode
from lora_jax.weights import PyTree

Save = Callable[[int, PyTree, Any], None]
LAYOUT = 3  # of what is saved; raised when it changes. Version 0.1.0 wrote none.


@contextlib.contextmanager
def saving(folder: Path, *, identity: Mapping[str, Any]) -> Iterator[Save]:
    """Yields `save(step, states, position)`, which writes asynchronously.

    It returns once `states` are copied, so that they may be donated to the next step. A checkpoint
    is written completely or not at all, and the newest two are kept. The next save, and the end of
    the context, wait for the last one and raise its error, if it has one.

    Args:
      folder: of the run's checkpoints.
      identity: what a later run must agree with to restore it, such as the base's fingerprint.

    The arguments of `save`: the checkpoint's number, the pytree of arrays that trains, and whatever
    JSON-like value is needed to go on, such as the data's position.
    """
    with _checkpointer(folder) as checkpointer:

        def save(step: int, states: PyTree, position: Any) -> None:
            record = {
                "layout": LAYOUT,
                "identity": dict(identity),
                "leaves": _leaves(states) | _own_bases(states),
                "position": position,
            }
            checkpointer.wait()  # or a save in progress would have this one skipped
            checkpointer.save_async(step, states, custom_metadata=record, overwrite=True)

        yield save


def save(
    folder: Path, step: int, states: PyTree, *, identity: Mapping[str, Any], position: Any
) -> None:
    """Writes one checkpoint as `saving` does, and waits for it."""
    with saving(folder, identity=identity) as write:
        write(step, states, position)


def restore(
    folder: Path, like: PyTree, *, identity: Mapping[str, Any]
) -> tuple[int, PyTree, Any] | None:
    """The newest checkpoint as `(step, states, position)`, or None where there is none yet.

    The arrays get the shardings of `like`, whatever the number of devices and processes that wrote
    them; each process reads its slices.

    Raises:
      ValueError: if it was made over another base or other data, for other arms or another method,
        or by version 0.1.0; or if its files cannot be read. Any other error, such
        as of memory, is raised unchanged.
    """
    with _checkpointer(folder) as checkpointer:
        latest = checkpointer.latest
        if latest is None:
            return None
        try:
            record = checkpointer.metadata(latest.step).custom_metadata
            theirs = {**record["identity"], **record["leaves"]}
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise _damaged(folder, latest.step, error) from error
        _require_layout(folder, record)
        _require_same(
            folder, {**identity, **_leaves(like), **_own_bases(like)}, theirs, first=identity
        )
        try:
            states = checkpointer.load(latest.step, jax.tree.map(_abstract, like))
        except Exception as error:
            _raise_as_it_is_unless_damaged(folder, latest.step, like, error)
            raise _damaged(folder, latest.step, error) from error
    return latest.step, states, record["position"]


def _require_layout(folder: Path, record: Mapping[str, Any]) -> None:
    if record.get("layout") != LAYOUT:
        raise ValueError(
            f"the checkpoint in {folder} was written by another version of lora_jax (0.1.0, unless "
            "it names one), whose training states are laid out differently. End that run with the "
            "version that began it, or choose another --workdir. Adapters that it left do load."
        )


def _require_same(
    folder: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any], first: Mapping[str, Any]
) -> None:
    names = sorted({*ours, *theirs}, key=lambda name: (name not in first, name))
    differing = [name for name in names if ours.get(name) != theirs.get(name)]
    if differing:
        shown = ", ".join(
            f"{name} is {theirs.get(name)} there and {ours.get(name)} here"
            for name in differing[:5]
        )
        raise ValueError(
            f"the checkpoint in {folder} is of another run: {shown}. Choose another --workdir, or "
            "go back to the base, data, arms and method that it was made with."
        )


def _raise_as_it_is_unless_damaged(folder: Path, step: int, like: PyTree, error: Exception) -> None:
    """Raises the cause of an error of Orbax's, unless the files are at fault: if it is an
    error of memory, rights or devices, or if the files can be read into host memory."""
    cause: BaseException = error
    while (deeper := cause.__cause__ or cause.__context__) is not None:
        cause = deeper
    of_machine = isinstance(cause, MemoryError | jax.errors.JaxRuntimeError | OSError)
    if of_machine and not isinstance(cause, FileNotFoundError):
        raise cause
    if jax.process_count() == 1 and _readable(folder / str(step), like):
        raise cause


def _readable(checkpoint: Path, like: PyTree) -> bool:
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    on_host = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host), like)
    try:
        ocp.load(checkpoint, on_host)
    except Exception:
        return False
    return True


def _checkpointer(folder: Path) -> ocp.training.Checkpointer:
    newest = ocp.training.preservation_policies.LatestN(2)
    return ocp.training.Checkpointer(folder.resolve(), preservation_policy=newest)


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _leaves(tree: PyTree) -> dict[str, str]:
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in paths.flatten(tree).items()}


def _own_bases(tree: PyTree) -> dict[str, str]:
    """The `own_base` of each node of a delta that has one: see `loftq_start`."""
    flat = paths.flatten(tree, is_leaf=lambda leaf: isinstance(leaf, DeltaNode))
    names = {path: getattr(node, "own_base", "") for path, node in flat.items()}
    return {f"{path}/own_base": name for path, name in names.items() if name}


def _damaged(folder: Path, step: int, error: Exception) -> ValueError:
    return ValueError(
        f"the checkpoint {folder / str(step)} is damaged ({type(error).__name__}). Delete that "
        "folder to go on from the one before, or choose another --workdir."
    )
