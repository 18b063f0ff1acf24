"""AdaLoRA; the statistics of its training are not in the file, and are initialised."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from lora_jax.interop.peft.codec import Codec, Contents, Nodes
from lora_jax.interop.peft.config import COUNT, NUMBER, Allowed
from lora_jax.interop.peft.layers import (
    adapted_layers,
    as_tensors,
    linear_layers,
    stacked,
    take,
    take_leaves,
)
from lora_jax.interop.peft.lora import VALUES as LORA_VALUES
from lora_jax.interop.peft.model import Model, Tensors
from lora_jax.interop.peft.names import Slot
from lora_jax.methods import AdaLoRA, AdaLoRANode
from lora_jax.methods.adalora import Statistics

_FACTORS, _VALUES = {"a": "lora_A", "b": "lora_B"}, "lora_E"

# PEFT's names of AdaLoRA's fields.
_FIELDS = {
    "total_step": "total_steps", "init_r": "rank", "target_r": "target_rank", "lora_alpha": "alpha",
    "tinit": "warmup", "tfinal": "final", "deltaT": "interval", "beta1": "beta1", "beta2": "beta2",
    "orth_reg_weight": "penalty", "lora_dropout": "dropout",
}  # fmt: skip


def _encode(nodes: Nodes, model: Model) -> Contents:
    methods = {node.method for node in cast(Any, nodes).values()}
    if len(methods) > 1:
        raise ValueError("PEFT's AdaLoRA has one schedule for all paths, the delta has several.")
    (method,) = methods
    modules: dict[str, Tensors] = {}
    for slot, node in linear_layers(nodes, model):
        if not np.any(np.asarray(node.scale)):
            continue  # a layer without it
        values, scale = np.asarray(node.e), np.float32(_scale(method))
        if node.scale != scale:
            values = values * (np.asarray(node.scale) / scale)
        modules[slot.module] = as_tensors(node, _FACTORS) | {_VALUES: values[:, None]}
    config = {name: getattr(method, field) for name, field in _FIELDS.items()}
    return Contents(config | {"bias": "none", "fan_in_fan_out": False}, modules)


def _decode(contents: Contents, model: Model) -> dict[str, Any]:
    method, masks = _method(contents.config, model), _masks(contents.config)
    nodes: dict[str, Any] = {}
    for path, found in adapted_layers(contents.modules, model):
        layers = {slot: _triplets(slot, found[slot], method, masks, model) for slot in found}
        not_saved: dict[str, Any] = dict.fromkeys(("mask", "sensitivity", "uncertainty"))
        node = stacked(
            model, path, AdaLoRANode, layers, method=method, dropout=method.dropout, **not_saved
        )
        zeros = Statistics(*(jnp.zeros(leaf.shape) for leaf in (node.a, node.e, node.b)))
        nodes[path] = dataclasses.replace(
            node, mask=jnp.ones(node.e.shape), sensitivity=zeros, uncertainty=zeros
        )
    return nodes


def _triplets(
    slot: Slot, given: Tensors, method: AdaLoRA, masks: Mapping[str, list[bool]], model: Model
) -> dict[str, Any]:
    """The leaves of one layer. Triplets that PEFT pruned from its file are zeros at the end."""
    values = take(model, slot, given, _VALUES, (None, 1))[:, 0]
    kept = _kept(slot, len(values), method.rank, masks, model)
    factors = take_leaves(model, slot, given, AdaLoRANode, _FACTORS, rank=kept)
    pruned = (0, method.rank - kept)
    return {
        "a": np.pad(factors["a"], ((0, 0), pruned)),
        "e": np.pad(values, pruned),
        "b": np.pad(factors["b"], (pruned, (0, 0))),
        "scale": _scale(method),
    }


def _method(config: Mapping[str, Any], model: Model) -> AdaLoRA:
    """The method that the config states. A schedule that leaves training no step, which only
    training would need, is replaced by one that prunes nothing."""
    stated = {ours: config.get(theirs) for theirs, ours in _FIELDS.items()}
    if "lora_alpha" in config and stated["alpha"] is None:
        raise ValueError(f"{model.source}: lora_alpha is null: there is no scale without it.")
    given = {field: value for field, value in stated.items() if value is not None}
    given["rank"] = given.get("rank", AdaLoRA.rank)
    if given.get("alpha", AdaLoRA.alpha) <= 0:
        given["alpha"] = float(given["rank"])  # as PEFT has it
    try:
        return AdaLoRA(**given)
    except ValueError:
        complete = {field: given[field] for field in ("rank", "alpha", "dropout") if field in given}
        return AdaLoRA(total_steps=1, target_rank=given["rank"], **complete)


def _scale(method: AdaLoRA) -> float:
    return method.alpha / (method.rank + 1e-5)


def _masks(config: Mapping[str, Any]) -> dict[str, list[bool]]:
    """From rank_pattern, which triplets of each module are left, by the module's name."""
    found = config.get("rank_pattern") or {}
    return {name.partition(".lora_E")[0]: mask for name, mask in found.items()}


def _kept(slot: Slot, found: int, rank: int, masks: Mapping[str, list[bool]], model: Model) -> int:
    mask = next((mask for name, mask in masks.items() if _ends(name, slot.module)), [True] * rank)
    if len(mask) != rank or sum(mask) != found:
        raise ValueError(
            f"{model.source}: {slot.module} has {found} triplets, but its config says init_r {rank}"
            f" and leaves {sum(mask)} of {len(mask)} to it."
        )
    return found


def _ends(name: str, module: str) -> bool:
    return name == module or name.endswith(f".{module}")


def _are_masks(value: Any) -> bool:
    return not value or (
        isinstance(value, dict)
        and all(isinstance(mask, list) for mask in value.values())
        and all(isinstance(kept, bool) for mask in value.values() for kept in mask)
    )


CODEC = Codec(
    types=("ADALORA",),
    nodes=(AdaLoRANode,),
    decode=_decode,
    encode=_encode,
    values=LORA_VALUES  # PEFT's config of AdaLoRA is a subclass of that of LoRA
    | dict.fromkeys(("init_r", "target_r", "total_step", "tinit", "tfinal", "deltaT"), COUNT)
    | dict.fromkeys(("beta1", "beta2", "orth_reg_weight"), NUMBER)
    | {"rank_pattern": Allowed.expected(_are_masks, "an object of lists of booleans")},
    own_biases="lora_only",
    ties_head=True,
)
