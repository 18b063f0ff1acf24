"""The mesh of a run's devices."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

from lora_jax.context_mesh import AXES


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices along the axes `arms`, `fsdp`, `sequence` and `tensor`.

    Args:
      sizes: how many devices each axis has; an axis that is not named has one, and one of size -1
        takes all that the others leave.
      devices: all of them by default. `tensor` gets neighbours, which exchange the most.

    Raises:
      ValueError: for an axis that does not exist, or sizes that do not divide the devices.
    """
    devices = jax.devices() if devices is None else devices
    unknown = [axis for axis in sizes if axis not in AXES]
    if unknown:
        raise ValueError(f"a mesh has no axis {unknown[0]!r}; its axes are {', '.join(AXES)}.")
    wanted = dict.fromkeys(AXES, 1) | dict(sizes)
    free = [axis for axis, count in wanted.items() if count == -1]
    fixed = math.prod(count for count in wanted.values() if count != -1)
    if len(free) > 1 or fixed < 1:
        raise ValueError(f"a mesh of {_named(sizes)}: sizes are positive, and one may be -1.")
    if free:
        wanted[free[0]] = len(devices) // fixed
    if math.prod(wanted.values()) != len(devices):
        raise ValueError(
            f"a mesh of {_named(sizes)} does not divide {len(devices)} devices: choose sizes whose "
            "product is the number of devices."
        )
    shape = tuple(wanted.values())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _named(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={count}" for axis, count in sizes.items()) or "one device"
