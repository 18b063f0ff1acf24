"""Checks that an adapter's file holds all tensors that its config states, and no others."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from lora_jax.interop.peft.model import Model, Tensors
from lora_jax.interop.peft.names import HEAD, parents
from lora_jax.interop.peft.targeted import saved, targeted
from lora_jax.weights import is_weight

_BESIDE = ("weight", "bias", "base_layer.weight", "base_layer.bias")


def check_targets(config: Mapping[str, Any], tensors: Iterable[str], model: Model) -> None:
    """Raises ValueError where the modules of target_modules and those in the file differ."""
    known = set(model.slots) | ({HEAD} if model.is_tied else set())
    found = {module for name in tensors for module in _adapted_module(name, known)}
    stated = targeted(model.source, config, known)
    if missing := stated - found:
        raise ValueError(
            f"{model.source} is incomplete: its config adapts {_listed(missing)}, of which the "
            "file has no tensor. Fetch it again, or save it again."
        )
    if config.get("ensure_weight_tying"):
        found = {name for name in found if name.rpartition(".")[2] != HEAD}
    if extra := found - stated:
        raise ValueError(
            f"{model.source}: its file has tensors of {_listed(extra)}, which its config does not "
            "adapt: the two belong to different adapters."
        )


def check_saved(config: Mapping[str, Any], tensors: Tensors, model: Model) -> None:
    """Raises ValueError where a module of modules_to_save, or a trained bias, is missing."""
    known = list(model.tensors()) + ([f"{HEAD}.weight"] if model.is_tied else [])
    modules = {name.rpartition(".")[0] for name in known}
    for name, found in saved(model.source, config, modules).items():
        if not found:
            raise ValueError(
                f"{model.source}: modules_to_save names {name!r}, which is no module of this base."
            )
        expected = {one for one in known if one.rpartition(".")[0] in found}
        if missing := expected - tensors.keys():
            raise ValueError(
                f"{model.source} is incomplete: it lacks {_listed(missing)}, of {name!r} in "
                "modules_to_save. Fetch it again, or save it again."
            )
    _check_biases(config, tensors, model)


def _check_biases(config: Mapping[str, Any], tensors: Tensors, model: Model) -> None:
    """Of a bias that the file holds, all layers that it trains must be there."""
    trained = config.get("bias") or "none"
    if trained == "none":
        return
    biases = {name: path for name, (path, _) in model.tensors().items() if name.endswith(".bias")}
    adapted = {
        module
        for name in tensors
        for module in parents(name)
        if name.removeprefix(f"{module}.") not in _BESIDE and module in model.slots
    }
    found, missing = set(), {}
    for name, path in biases.items():
        module = name.removesuffix(".bias")
        if name in tensors or f"{module}.base_layer.bias" in tensors:
            found.add(path)
        elif trained == "all" or module in adapted:
            missing[name] = path
    lacks = {name for name, path in missing.items() if path in found or not found}
    if lacks:
        raise ValueError(
            f"{model.source} is incomplete: its config says bias={trained!r}, and the file lacks "
            f"{_listed(lacks)}."
        )


def without_base(tensors: Tensors, model: Model) -> Tensors:
    """The tensors without the base's own, which PEFT saves beside the factors of an embedding and
    of an output head, in case that they were resized.

    Raises:
      ValueError: where these are not this base's.
    """
    end = ".base_layer.weight"
    for name in [name for name in tensors if name.endswith(end)]:
        slot = model.slots.get(name.removesuffix(end))
        if slot is None and not (model.is_tied and name == HEAD + end):
            raise ValueError(f"{model.source}: {name!r} belongs to no module of this model.")
        path = slot.path if slot else next(s.path for s in model.slots.values() if s.is_embedding)
        layer = slot.layer if slot else None
        _check_same(name, tensors[name], path, layer, model)
    return {name: value for name, value in tensors.items() if not name.endswith(end)}


def _check_same(name: str, theirs: np.ndarray, path: str, layer: int | None, model: Model) -> None:
    leaf = model.leaf(path)
    shape = leaf.shape if layer is None else leaf.shape[1:]
    same = theirs.ndim == 2 and sorted(theirs.shape) == sorted(shape)
    if same and not isinstance(leaf, jax.ShapeDtypeStruct) and not is_weight(leaf):
        ours = model.value(path, layer)
        theirs = np.asarray(theirs, np.float32)
        same = ours.shape == theirs.shape and np.allclose(ours, theirs, rtol=1e-2, atol=1e-3)
    if not same:
        raise ValueError(
            f"{model.source}: {name.removesuffix('.base_layer.weight')} was adapted over another "
            f"weight, of shape {theirs.shape}: this base's {path}, of shape {tuple(shape)}, has "
            "another shape or other entries."
        )


def _adapted_module(name: str, known: set[str]) -> Iterable[str]:
    """The module whose adapter the tensor is a part of, if it is one."""
    for module in parents(name):
        rest = name.removeprefix(f"{module}.")
        if module in known and rest not in _BESIDE and not rest.startswith("token_adapter."):
            yield module


def _listed(names: Iterable[str], limit: int = 4) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
