"""The devices of a run, as `config.parallel` says."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lora_jax import parallel, training
from lora_jax.interop import Place, on_device, quantized, sharded
from lora_jax.quant import quantizer
from lora_jax.training.execution import Execution, single
from lora_jax.weights import PyTree

Devices = Sequence[jax.Device] | None


def mesh_of(config: ConfigDict, devices: Devices = None) -> Mesh | None:
    """The mesh of a mode that has one, or of the one device among several that "single" takes; of
    all devices unless some are given.

    Raises:
      ValueError: for an unknown mode, or sizes that it does not take.
    """
    settings = config.parallel
    if settings.mode == "single" and jax.process_count() > 1:
        raise ValueError(
            f"config.parallel.mode='single' runs on one device, not on {jax.process_count()} "
            "processes: choose pmap, fsdp, tensor or fsdp+tensor."
        )
    sizes = {name: settings[name] for name in ("tensor", "sequence", "arms")}
    if settings.mode not in ("single", "pmap"):
        return parallel.mesh_of(settings.mode, **sizes, devices=devices)
    devices = jax.devices() if devices is None else devices
    if settings.mode == "single" and len(devices) > 1 and set(sizes.values()) == {1}:
        return parallel.make_mesh({}, devices[:1])  # which tells kernels that it is alone
    for name, size in sizes.items():
        if size != 1:
            raise ValueError(
                f"config.parallel.{name}={size} beside mode {settings.mode!r}, which has no mesh: "
                "choose fsdp, tensor or fsdp+tensor."
            )
    return None


def execution(config: ConfigDict, params: PyTree, devices: Devices = None) -> Execution:
    """How steps run over these params."""
    mesh = mesh_of(config, devices)
    if mesh is not None:
        return parallel.on_mesh(mesh, parallel.match_specs(params, parallel.LLAMA_RULES))
    return parallel.replicated(devices) if config.parallel.mode == "pmap" else single()


def over_devices(config: ConfigDict, params: PyTree, loss: training.LossSum) -> training.LossSum:
    """The loss for a base that lies over the run's devices."""
    if config.parallel.mode in ("single", "pmap"):
        return loss
    return parallel.over_mesh(loss, parallel.match_specs(params, parallel.LLAMA_RULES))


def placed(config: ConfigDict, format: Mapping[str, Any] | None) -> Place:
    """Puts each leaf of a file where the run wants it, quantised where a format is given."""
    mesh = mesh_of(config)
    if mesh is None:
        return on_device if format is None else quantized(**format)

    def sharding(path: str, leaf: Any) -> Any:
        spec = parallel.spec_of(path, leaf, parallel.LLAMA_RULES)
        return parallel.leaf_sharding(mesh, path, leaf, spec)

    return sharded(sharding, None if format is None else quantizer(**format))
