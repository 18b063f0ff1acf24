"""The ways to run a training step on several devices; each gives the numbers of one device."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lora_jax.context_mesh import ARMS
from lora_jax.parallel import hosts
from lora_jax.parallel.mesh import make_mesh
from lora_jax.parallel.rules import Specs
from lora_jax.parallel.shardings import (
    base_shardings,
    batch_sharding,
    delta_shardings,
    require_divisible,
    state_shardings,
)
from lora_jax.training import execution
from lora_jax.training.execution import AXIS, Execution
from lora_jax.training.losses.fields import POSITIONS, ROWS, Field, Fields, check_batch
from lora_jax.training.rows import rows_of

MODES = ("single", "pmap", "fsdp", "tensor", "fsdp+tensor")


def mesh_of(
    mode: str,
    *,
    tensor: int = 1,
    sequence: int = 1,
    arms: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """The mesh of a mode by name: "fsdp" gives the devices that `sequence` and `arms` leave to
    `fsdp`, "tensor" to `tensor`, and "fsdp+tensor" those that `tensor` leaves, too, to `fsdp`.

    Raises:
      ValueError: for a name that is none of these, sizes that do not divide the devices, or
        a size of `tensor` that the mode does not take.
    """
    rest: Mapping[str, Mapping[str, int]] = {
        "fsdp": {"fsdp": -1},
        "tensor": {"tensor": -1},
        "fsdp+tensor": {"fsdp": -1, "tensor": tensor},
    }
    if mode not in rest:
        raise ValueError(f"mode {mode!r}: expected one of {', '.join(MODES)}.")
    if tensor != 1 and mode != "fsdp+tensor":
        raise ValueError(
            f"tensor={tensor} beside mode {mode!r}, which takes no such size: choose fsdp+tensor."
        )
    return make_mesh({"sequence": sequence, "arms": arms, **rest[mode]}, devices)


def on_mesh(mesh: Mesh, specs: Specs, fields: Fields | None = None) -> Execution:
    """Weights, deltas and batches sharded over a mesh, by `jit`: XLA adds the collectives.

    Args:
      mesh: from `make_mesh` or `mesh_of`.
      specs: the sharding spec of each leaf of the base, from `match_specs`.
      fields: the axes of a batch's arrays, such as `loss.fields`; other arrays of a batch
        are left out. Without them every array is `[rows, positions, ...]`.
    """

    on_all = NamedSharding(mesh, PartitionSpec())  # of what the host reads, on every process

    def shardings(state, stacked):
        if isinstance(state, tuple):
            return tuple(shardings(arm, False) for arm in state)
        if stacked and (count := jnp.size(state.seed)) % mesh.shape[ARMS]:
            raise ValueError(
                f"{count} arms cannot be split over arms={mesh.shape[ARMS]}: choose a mesh whose "
                "axis of arms divides them."
            )
        return state_shardings(mesh, state, specs, arms=stacked)

    def step(fn, stacked):
        def constrained(state, base, batch, *rest):
            moved, metrics = fn(state, base, batch, *rest)
            metrics = jax.lax.with_sharding_constraint(metrics, on_all)
            return jax.tree.map(_constrained, moved, shardings(moved, stacked)), metrics

        return jax.jit(constrained, donate_argnums=0)

    def gradients(fn):
        def constrained(state, base, batch):
            grads, *numbers = fn(state, base, batch)
            numbers = jax.lax.with_sharding_constraint(numbers, on_all)
            sharded = jax.tree.map(_constrained, grads, delta_shardings(mesh, grads, specs))
            return sharded, *numbers

        return jax.jit(constrained)

    def change(fn, **options):
        def constrained(state, *rest):
            moved, number = fn(state, *rest)
            return jax.tree.map(_constrained, moved, shardings(moved, False)), number

        return execution.change(constrained, **options)

    def shard_arms(delta):
        return jax.tree.map(_constrained, delta, delta_shardings(mesh, delta, specs, arms=True))

    def batch(values):
        known = {name: _plain(x) for name, x in values.items()} if fields is None else fields
        if fields is not None:
            check_batch("a step on this mesh", fields, values)
        require_divisible(mesh, values, known)
        return {
            name: hosts.place(values[name], batch_sharding(mesh, field.axes))
            for name, field in known.items()
        }

    return Execution(
        base=lambda base: hosts.place(base, base_shardings(mesh, base, specs)),
        states=lambda state, stacked: jax.tree.map(_put, state, shardings(state, stacked)),
        batch=batch,
        step=step,
        evaluate=lambda fn: jax.jit(fn, out_shardings=on_all),
        gradients=gradients,
        change=change,
        shard_arms=shard_arms,
        context=lambda: jax.set_mesh(mesh),
        arms_axis=ARMS,
    )


def row_of(devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of one axis that `replicated` works on: the devices in the order given, as
    `pmap`'s."""
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(devices: Sequence[jax.Device] | None = None) -> Execution:
    """`jax.pmap`: base and states replicated, the batch's rows sharded."""
    devices = jax.devices() if devices is None else devices
    count, mesh = len(devices), row_of(devices)
    on_all = NamedSharding(mesh, PartitionSpec())
    ours = [device.process_index == jax.process_index() for device in devices]

    def batch(values):
        rows = rows_of(values)
        if rows % count:
            raise ValueError(
                f"a batch of {rows} rows cannot be split over {count} devices: choose a multiple "
                f"of {count}."
            )
        return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:])[ours], dict(values))

    def mapped(fn, axes, **options):
        call = jax.pmap(fn, AXIS, in_axes=axes, out_axes=None, devices=devices, **options)
        return lambda *args: hosts.across_processes(call(*args), mesh)

    def evaluate(fn):
        def summed(delta, base, batch):
            return jax.lax.psum(fn(delta, base, batch), AXIS)

        return mapped(summed, (None, None, 0))

    def step(fn, stacked):
        axes = (None, None, 0, None) if stacked else (None, None, 0)
        return mapped(fn, axes, donate_argnums=0)

    return Execution(
        base=lambda base: jax.tree.map(lambda leaf: hosts.place(leaf, on_all), base),
        states=lambda state, stacked: jax.tree.map(lambda leaf: _put(leaf, on_all), state),
        batch=batch,
        step=step,
        evaluate=evaluate,
        gradients=lambda fn: mapped(fn, (None, None, 0)),
        change=execution.change,
        shard_arms=lambda delta: delta,
        axis_name=AXIS,
    )


def _plain(array: Any) -> Field:
    """The field of an array that no loss declares: `[rows, positions, ...]`."""
    axes = [ROWS, POSITIONS, *map(str, array.shape[2:])]
    return Field(" ".join(axes[: array.ndim]), array.dtype)


def _put(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    """The leaf, sharded, in the same memory kind and in a buffer of its own: a step donates it."""
    memory_kind = leaf.sharding.memory_kind or "device"
    if leaf.is_fully_addressable:
        # Replicated over several devices, one of them keeps the caller's memory: may_alias=False
        # is not heeded there (jax 0.10.2 and 0.12).
        leaf = execution.own_memory(leaf)
    return hosts.place(leaf, sharding.with_memory_kind(memory_kind), may_alias=False)


def _constrained(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    if jax.typeof(leaf).memory_space != jax.memory.Space.Device:
        return leaf
    return jax.lax.with_sharding_constraint(leaf, sharding)
