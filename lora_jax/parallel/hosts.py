"""Several processes as one job, on JAX's own distributed runtime.

Every process runs the same program on its own devices. An array over all of them is global: each
process holds its slices. What hosts decide (to stop, to continue, to fail) all must decide alike,
so it goes through a collective; a process that left alone would make the others wait until JAX's
heartbeat timeout ends the job (but for `ending.together`).
"""

import contextlib
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

from lora_jax.weights import PyTree


def start(
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_seconds: int = 100,
) -> None:
    """Joins this process to its job, before anything else touches JAX's devices.

    JAX finds by itself what is not given: on a TPU pod, under Slurm, Open MPI and Kubernetes.

    Args:
      coordinator_address: `host:port` of process 0, which all processes can reach.
      num_processes: how many there are.
      process_id: which this is, from 0.
      timeout_seconds: how long after a process has died, or ended with an error, JAX ends the rest.

    Raises:
      ValueError: for an argument that is not given and that JAX cannot find.
    """
    # `preemption` replaces JAX's service, which counts steps from 0: a notice that arrives while a
    # resumed run still loads would be set for a step that the run is already past.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=timeout_seconds,
            shutdown_timeout_seconds=timeout_seconds,
        )
    except ValueError as error:
        raise ValueError(
            f"this process cannot join a job: {error} JAX finds the others by itself on a TPU pod, "
            "under Slurm, Open MPI and Kubernetes (there with the package `kubernetes`). "
            "Elsewhere give --coordinator_address, --num_processes and --process_id."
        ) from error


def is_first() -> bool:
    """Whether this is process 0, the one that logs and writes records."""
    return jax.process_index() == 0


def exchange(value: Any) -> list[Any]:
    """The JSON-like values of all processes, in their order; all of them must call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(text.size))
    rows = multihost_utils.process_allgather(np.pad(text, (0, lengths.max() - text.size)))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, lengths, strict=True)]


def require_agreement(settings: Mapping[str, Any]) -> None:
    """Checks that all processes were started with the same settings, given flat by name.

    Raises:
      ValueError: on every process, naming what differs.
    """
    first, *others = exchange(dict(settings))
    for process, other in enumerate(others, start=1):
        names = sorted({*first, *other})
        differing = [name for name in names if first.get(name) != other.get(name)]
        if differing:
            shown = ", ".join(
                f"{name} ({first.get(name)!r} on process 0, {other.get(name)!r} on process "
                f"{process})"
                for name in differing[:5]
            )
            raise ValueError(
                f"the processes of this job disagree on {shown}. Start all of them with the same "
                "command."
            )


def require_shared(path: Path) -> None:
    """Checks that all processes see what process 0 has written.

    Raises:
      ValueError: on every process, naming those that do not.
    """
    blind = [str(process) for process, seen in enumerate(exchange(path.exists())) if not seen]
    if blind:
        raise ValueError(
            f"process {', '.join(blind)} does not see {path}, which process 0 has written: choose "
            "a --workdir in a file system that all processes share."
        )


def on_first(work: Callable[[], None]) -> None:
    """Calls `work` on process 0, while the others wait.

    Raises:
      ValueError: on every process, where `work` raised one, or an `OSError`. Anything else
        is raised unchanged on process 0, and as a ValueError that says so on the others.
    """
    error: BaseException | None = None
    if is_first():
        try:
            work()
        except BaseException as raised:  # the others wait, whatever it is
            error = raised
    message = exchange(None if error is None else error_text(error))[0]
    if isinstance(error, OSError):
        raise ValueError(message) from error
    if error is not None:
        raise error
    if message is not None:
        raise ValueError(message)


def error_text(error: BaseException) -> str:
    """The error's message, with its type unless it was raised for users."""
    clear = isinstance(error, ValueError | OSError) and str(error)
    return str(error) if clear else f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
    """Within it SIGTERM, as a notice of preemption, ends nothing.

    Yields a function that returns whether any process has received the signal. All processes must
    call it at the same points, where they wait for their devices anyway: it is a collective.
    """
    noticed: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: noticed.append(number))
    try:
        yield lambda: bool(np.any(multihost_utils.process_allgather(bool(noticed))))
    finally:
        signal.signal(signal.SIGTERM, before)


def place(tree: PyTree, shardings: PyTree, *, may_alias: bool | None = None) -> PyTree:
    """`jax.device_put` for a job of several processes, each of which holds the same values.

    Each device gets its slice, and nothing is sent between processes. This is how a batch is
    split: every process iterates over the same batches, so that rows, and the position in them, do
    not depend on how many processes there are.
    """

    def put(value: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        is_global = isinstance(value, jax.Array) and not value.is_fully_addressable
        if is_global or sharding.is_fully_addressable:
            return jax.device_put(value, sharding, may_alias=may_alias)
        values = np.asarray(value)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(put, tree, shardings)


def across_processes(tree: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """What `pmap` returned on each process, replicated, as global arrays of the mesh."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.host_local_array_to_global_array(tree, mesh, PartitionSpec())


def gathered(tree: PyTree) -> PyTree:
    """The tree with arrays that are sharded over processes gathered on each, as numpy arrays."""

    def gather(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(gather, tree)
