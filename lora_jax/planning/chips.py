"""Machines to compile for without having them: the figures of a chip, and the topologies.

Figures are those of the vendors, for one JAX device, without sparsity; none was measured here.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """The figures of one device; None where they are not known.

    Attributes:
      platform: that programs are lowered for: tpu, cuda or cpu.
      memory: bytes of main memory that a program may take.
      flops: bfloat16 operations a second with float32 sums.
      bandwidth: bytes a second to and from main memory.
      links: bytes a second that leave the device over all links to its peers.
      shapes: of its machines: chips along each axis, or the number of GPUs.
      cores: JAX devices of one chip.
    """

    platform: str
    memory: float | None = None
    flops: float | None = None
    bandwidth: float | None = None
    links: float | None = None
    shapes: tuple[str, ...] = ()
    cores: int = 1


_SQUARE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_NODES = ("1", "2", "4", "8", "16", "32", "64", "128")
# TPUs: memory is what libtpu 0.0.52 compiles for, the chip's own less what it keeps to itself; the
# rest is of the tables of docs.cloud.google.com/tpu/docs/ (v4, v5e, v5p, v6e, tpu7x), which give
# links in both directions, half of it here. v4's links: Jouppi et al. 2023, arXiv:2304.01433,
# table 4; tpu7x's bandwidth of memory: Google at Hot Chips 2025. A chip of tpu7x is two devices.
# GPUs: nvidia.com/en-us/data-center/h100 and h200, the SXM modules without sparsity; NVLink's 900
# GB/s are those of both directions.
CHIPS = {
    "v4": Chip(
        platform="tpu", shapes=_CUBIC,
        memory=30.75 * GIB, flops=275e12, bandwidth=1.2e12, links=300e9,
    ),
    "v5e": Chip(
        platform="tpu", shapes=_SQUARE,
        memory=15.75 * GIB, flops=197e12, bandwidth=819e9, links=200e9,
    ),
    "v5p": Chip(
        platform="tpu", shapes=_CUBIC,
        memory=95.73 * GIB, flops=459e12, bandwidth=2765e9, links=600e9,
    ),
    "v6e": Chip(
        platform="tpu", shapes=_SQUARE,
        memory=31.24 * GIB, flops=918e12, bandwidth=1638e9, links=400e9,
    ),
    "tpu7x": Chip(
        platform="tpu", shapes=_CUBIC, cores=2,
        memory=94.74 * GIB, flops=2307e12 / 2, bandwidth=7.3e12 / 2, links=300e9,
    ),
    "h100": Chip(
        platform="cuda", shapes=_NODES,
        memory=80e9, flops=989e12, bandwidth=3.35e12, links=450e9,
    ),
    "h200": Chip(
        platform="cuda", shapes=_NODES,
        memory=141e9, flops=989e12, bandwidth=4.8e12, links=450e9,
    ),
    "cpu": Chip(platform="cpu", shapes=("1", "2", "4", "8", "16")),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Machine:
    """A chip and the devices to compile for, which need not be present."""

    name: str
    chip: Chip
    devices: Sequence[jax.Device]

    @property
    def chips(self) -> int:
        return len(self.devices) // self.chip.cores


def shapes_of(kind: str) -> list[str]:
    """The names of a kind's machines, the smallest first.

    Raises:
      ValueError: for a kind that is not known.
    """
    if kind not in CHIPS:
        raise ValueError(f"no chip {kind!r} is known: expected one of {', '.join(CHIPS)}.")
    return [f"{kind}:{shape}" for shape in CHIPS[kind].shapes]


def machine(name: str) -> Machine:
    """The machine of a name such as "v5e:4x4", "h100:8", "cpu" or "cpu:8".

    Raises:
      ValueError: for a name that is not known, naming those that are, and where the compiler for it
        is not installed.
    """
    kind, _, shape = name.partition(":")
    known = shapes_of(kind)
    shape = shape or ("1" if kind == "cpu" else "")
    if f"{kind}:{shape}" not in known:
        raise ValueError(f"no topology {name!r} is known: expected one of {', '.join(known)}.")
    chip = CHIPS[kind]
    find = {"tpu": _tpus, "cuda": _gpus, "cpu": _cpus}[chip.platform]
    return Machine(name, chip, find(kind, shape))


def _tpus(kind: str, shape: str) -> Sequence[jax.Device]:
    _require("libtpu", "TPU")
    # The compiler looks for a TPU on the host, and warns where it finds none.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    options = {"chip_config_name": "megacore"} if kind == "v4" else {}
    return topologies.get_topology_desc(
        platform="tpu", topology_name=f"{kind}:{shape}", **options
    ).devices


def _gpus(kind: str, shape: str) -> Sequence[jax.Device]:
    _require("jax_cuda13_plugin", "GPU")
    hosts, each = max(1, int(shape) // 8), min(8, int(shape))
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=kind,
        topology=f"1x{hosts}x{each}",
        target_config=_HOPPER.format(**_HOPPERS[kind]),
    ).devices


def _cpus(kind: str, shape: str) -> Sequence[jax.Device]:
    if int(shape) > jax.config.values["jax_num_cpu_devices"]:
        with contextlib.suppress(RuntimeError):  # a backend that runs keeps its devices
            jax.config.update("jax_num_cpu_devices", int(shape))
    devices = jax.devices("cpu")
    if len(devices) < int(shape):
        raise ValueError(f"{kind}:{shape}: JAX runs already, with {len(devices)} CPU devices.")
    return devices[: int(shape)]


def _require(module: str, platform: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"the {platform} compiler is not installed: pip install -r requirements-aot.txt, on "
            "Python 3.12 or newer; no device is needed."
        )


_HOPPERS = {
    "h100": {
        "name": "NVIDIA H100 80GB HBM3", "memory": 84_942_979_072, "bandwidth": 3_352_320_000_000
    },
    "h200": {"name": "NVIDIA H200", "memory": 150_754_820_096, "bandwidth": 4_800_000_000_000},
}  # fmt: skip
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""


def chip_count(name: str) -> int:
    """How many chips a machine of this name has."""
    return math.prod(int(count) for count in name.partition(":")[2].split("x"))
