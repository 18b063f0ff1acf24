"""The devices of a run, as `config.parallel` says."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments.harness.arms import Arm, trained_together
from lora_jax import models, parallel
from lora_jax.context_mesh import FSDP
from lora_jax.interop import Place, on_device, quantized, sharded
from lora_jax.quant import quantizer
from lora_jax.training.execution import AXIS, Execution, single
from lora_jax.training.losses.fields import Fields
from lora_jax.training.losses.loss import Loss
from lora_jax.training.sweep import Mode, resolve_mode
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


def while_loading(config: ConfigDict) -> contextlib.AbstractContextManager:
    """Keeps what no `Place` spreads, the packed weights of bitsandbytes, in the host's memory until
    `Execution.base` does."""
    if mesh_of(config) is None:
        return contextlib.nullcontext()
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def execution(
    config: ConfigDict, params: PyTree, fields: Fields, devices: Devices = None
) -> Execution:
    """How steps run over these params, on batches of the loss's `fields`.

    Raises:
      ValueError: see `mesh_of`; and for a batch whose rows the parts of a step and the devices that
        share each part do not divide.
    """
    mesh = mesh_of(config, devices)
    _require_rows(config, mesh, devices)
    if mesh is not None:
        specs = parallel.match_specs(params, rules(config))
        return parallel.on_mesh(mesh, specs, fields)
    return parallel.replicated(devices) if config.parallel.mode == "pmap" else single()


def _require_rows(config: ConfigDict, mesh: Mesh | None, devices: Devices) -> None:
    splits = _splits(config, mesh, devices)
    unit, rows = math.prod(splits.values()), config.data.batch_size
    if rows % unit:
        over = " and ".join(f"{name}={parts}" for name, parts in splits.items() if parts > 1)
        raise ValueError(
            f"config.data.batch_size: {rows} rows cannot be split over {over}. Choose a multiple "
            f"of {unit}, or split them less."
        )


def rows_unit(config: ConfigDict) -> int:
    """What `config.data.batch_size` must be a multiple of."""
    return math.prod(_splits(config, mesh_of(config), None).values())


def _splits(config: ConfigDict, mesh: Mesh | None, devices: Devices) -> dict[str, int]:
    """Into how many parts the rows of a step are split, by what splits them."""
    if config.parallel.mode == "pmap":
        axis, count = AXIS, len(jax.devices() if devices is None else devices)
    else:
        axis, count = FSDP, 1 if mesh is None else mesh.shape[FSDP]
    if config.train.accumulate < 1:
        raise ValueError(f"config.train.accumulate={config.train.accumulate}: expected 1 or more.")
    return {"config.train.accumulate": config.train.accumulate, axis: count}


def require_even_arms(config: ConfigDict, arms: Sequence[Arm], mode: Mode | None = None) -> None:
    """Checks that a batched sweep can divide its arms among devices, before any of them trains.

    Args:
      config: its `parallel.arms` says over how many devices arms are spread.
      arms: all that the run will train.
      mode: the sweep's; as this machine resolves `config.sweep.mode` unless it is given.

    Raises:
      ValueError: naming the first group of arms, trained together, that these do not divide.
    """
    spread = config.parallel.arms
    if spread == 1 or resolve_mode(mode or config.sweep.mode) != "batched":
        return
    for group in trained_together(arms):
        if len(group) % spread:
            raise ValueError(
                f"config.parallel.arms={spread} does not divide the arms that train together, "
                f"{len(group)} in number: {', '.join(arm.name for arm in group)}. Choose "
                "config.parallel.arms=1, or ranks, learning rates and seeds that make groups it "
                "divides."
            )


def rules(config: ConfigDict) -> parallel.Rules:
    """Sharding specs of the model's leaves, by rules over paths."""
    return models.SHAPES[config.model.shape].family.sharding


def over_devices(config: ConfigDict, params: PyTree, loss: Loss) -> Loss:
    """The loss for a base that is placed on the run's devices."""
    if config.parallel.mode in ("single", "pmap"):
        return loss
    specs = parallel.match_specs(params, rules(config))
    return dataclasses.replace(loss, sums=parallel.over_mesh(loss.sums, specs))


def placed(config: ConfigDict, format: Mapping[str, Any] | None) -> Place:
    """Puts each leaf of a file where the run wants it, quantised where a format is given."""
    mesh = mesh_of(config)
    if mesh is None:
        return on_device if format is None else quantized(**format)

    def sharding(path: str, leaf: Any) -> Any:
        spec = parallel.spec_of(path, leaf, rules(config))
        return parallel.leaf_sharding(mesh, path, leaf, spec)

    place = sharded(sharding)
    if format is None:
        return place
    return parallel.quantized_in_parts(sharding, quantizer(**format), place)
