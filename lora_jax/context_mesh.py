"""Sharding over the mesh of the context (`jax.set_mesh`), for models and losses, which take no
mesh. Without a mesh, and under a shard_map, nothing here has an effect.

A model's activations `[B, T, ...]` are sharded with their rows over the axis `fsdp` and their
positions over `sequence`; its weights over `fsdp` and `tensor`; the arms of a sweep over `arms`.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec

ARMS, FSDP, SEQUENCE, TENSOR = AXES = ("arms", "fsdp", "sequence", "tensor")


def device() -> Any:
    """The device that is compiled for: one of the mesh, which may be abstract, or the default."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def size(axis: str) -> int:
    """Over how many devices XLA shards values along an axis of the mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.auto_axes else 1


def is_unsharded() -> bool:
    """Whether arrays are surely not sharded: a kernel cannot be partitioned automatically."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """`x` sharded by `spec`, an entry for each of its first axes; the others are replicated."""
    used = tuple(entry if entry and size(entry) > 1 else None for entry in spec)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*used)) if any(used) else x
