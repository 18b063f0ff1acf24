"""Whole tensors in an adapter: PEFT's modules_to_save and trained biases, our `Full`."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.interop.peft.codec import Codec
from lora_jax.interop.peft.model import Model, Tensors
from lora_jax.interop.peft.names import HEAD, TABLE
from lora_jax.interop.peft.targeted import saved
from lora_jax.methods import FullNode


def to_peft(
    nodes: Mapping[str, FullNode], model: Model, adapted: set[str], codec: Codec
) -> tuple[dict[str, Any], Tensors]:
    """Their part of adapter_config.json, and the trained values.

    PEFT saves and loads whole modules: a trained weight is saved with its bias. `adapted` are the
    modules of the adapter's own method, of `codec`: PEFT saves their biases under another name.
    """
    if unnamed := [path for path in nodes if path not in model.names]:
        raise ValueError(
            f"{', '.join(unnamed)}: no PyTorch module is named for this path. Add it to names."
        )
    known = model.tensors()
    if codec.check_whole:
        codec.check_whole(nodes, model)
    changed = [name for name, (path, _) in known.items() if path in nodes]
    whole = {_module(name) for name in changed if not name.endswith(".bias")}
    biases = {_module(name) for name in changed} - whole
    if codec.own_biases is None:
        if biases & adapted:
            raise ValueError(
                f"{_first(biases & adapted)}.bias: PEFT's type {codec.types[0]} has no trained "
                "bias of a layer that it adapts. Merge the adapter and export the merged model."
            )
        whole, biases = whole | biases, set()
    taken = _taken(model, {_module(name) for name in known}, whole, adapted)
    weights = [name for name in known if _module(name) in taken]
    tensors = _values(nodes, model, [*weights, *(f"{module}.bias" for module in biases)])
    config: dict[str, Any] = {"modules_to_save": sorted(whole) or None}
    if biases:
        config["bias"] = codec.own_biases if biases <= adapted else "all"
    for module in biases & adapted:
        tensors[f"{module}.base_layer.bias"] = tensors.pop(f"{module}.bias")
    return config | _tied_head(config, tensors, model, codec), tensors


def from_peft(tensors: Tensors, model: Model) -> dict[str, FullNode]:
    """Removes the tensors that are whole leaves of the model, or a layer of one, from `tensors`."""
    for name in [name for name in tensors if name.endswith(".base_layer.bias")]:
        plain = name.replace(".base_layer.", ".")
        if plain in tensors:
            raise ValueError(f"{model.source} has one bias twice, as {name} and {plain}.")
        tensors[plain] = tensors.pop(name)
    found: dict[str, np.ndarray] = {}
    for name, (path, layer) in model.tensors().items():
        if name not in tensors:
            continue
        value, base = np.asarray(tensors.pop(name), np.float32), model.value(path, layer)
        if value.shape != base.shape:
            raise ValueError(
                f"{model.source}: {name} has shape {value.shape}, {path} of this base {base.shape}."
            )
        delta = found.setdefault(path, np.zeros_like(model.value(path)))
        delta[... if layer is None else layer] = value - base
    return {
        path: FullNode(delta=jnp.asarray(model.from_torch(path, delta)))
        for path, delta in found.items()
    }


def _taken(model: Model, modules: set[str], whole: set[str], adapted: set[str]) -> set[str]:
    """The modules that these names mean to PEFT."""
    found = saved(model.source, {"modules_to_save": sorted(whole)}, modules).values()
    taken: set[str] = set().union(*found)
    if both := taken & adapted:
        raise ValueError(
            f"{_first(both)}: PEFT cannot adapt a module and save it whole, or one whose name ends "
            "alike. Merge the adapter and export the merged model."
        )
    return taken


def _values(nodes: Mapping[str, FullNode], model: Model, names: Iterable[str]) -> Tensors:
    """The values of these tensors with the delta added, where it has one."""
    known, read = model.tensors(), dict[str, np.ndarray]()
    for path, node in nodes.items():
        model.value(path)  # raises for a base of shapes
        merged = np.asarray(node.merge(model.leaf(path)), np.float32)
        read[path] = model.as_torch(path, merged)
    values: Tensors = {}
    for name in names:
        path, layer = known[name]
        whole = read[path] if path in read else model.value(path)
        values[name] = whole if layer is None else whole[layer]
    return values


def _tied_head(
    config: dict[str, Any], tensors: Tensors, model: Model, codec: Codec
) -> dict[str, Any]:
    """PEFT saves both a tied table and its head, and ties them again where its type can."""
    table = next((name for name in tensors if name.endswith(f"{TABLE}.weight")), None)
    if table is None or not model.is_tied:
        return {}
    tensors[f"{HEAD}.weight"] = tensors[table]
    if codec.ties_head:
        return {"ensure_weight_tying": True}
    return {"modules_to_save": [*config["modules_to_save"], HEAD]}


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _first(modules: Iterable[str]) -> str:
    return min(modules)
