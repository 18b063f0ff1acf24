"""AdaLoRA, with what its training would need to go on left fresh."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.interop.peft.config import target_modules
from lora_jax.interop.peft.model import Model, Tensors, layer_of, take
from lora_jax.interop.peft.names import Slot
from lora_jax.methods import AdaLoRA, AdaLoRANode, DeltaNode
from lora_jax.methods.adalora import Statistics

# PEFT's names of AdaLoRA's fields.
_FIELDS = {
    "total_step": "total_steps", "init_r": "rank", "target_r": "target_rank", "lora_alpha": "alpha",
    "tinit": "warmup", "tfinal": "final", "deltaT": "interval", "beta1": "beta1", "beta2": "beta2",
    "orth_reg_weight": "penalty", "lora_dropout": "dropout",
}  # fmt: skip


def to_peft(nodes: Mapping[str, Any], model: Model) -> tuple[dict[str, Any], Tensors]:
    methods = {node.method for node in nodes.values()}
    if len(methods) > 1:
        raise ValueError("PEFT's AdaLoRA has one schedule for all paths, the delta has several.")
    (method,) = methods
    tensors: Tensors = {}
    modules = []
    for slot in model.slots_at(nodes):
        node = layer_of(nodes[slot.path], slot)
        if not np.any(np.asarray(node.scale)):
            continue  # a layer without it
        values, scale = np.asarray(node.e), np.float32(_scale(method))
        if node.scale != scale:
            values = values * (np.asarray(node.scale) / scale)
        tensors |= {
            f"{slot.module}.lora_A": np.asarray(node.a).T,
            f"{slot.module}.lora_E": values[:, None],
            f"{slot.module}.lora_B": np.asarray(node.b).T,
        }
        modules.append(slot.module)
    config = {name: getattr(method, field) for name, field in _FIELDS.items()}
    config |= {
        "peft_type": "ADALORA",
        "target_modules": target_modules(modules, list(model.slots)),
        "bias": "none",
        "fan_in_fan_out": False,
    }
    return config, tensors


def from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, Tensors], model: Model
) -> dict[str, DeltaNode]:
    """AdaLoRANode that PEFT pruned from its file come back as zeros at the end."""
    method = _method(config, model)
    rank, masks = method.rank, _masks(config)
    nodes: dict[str, DeltaNode] = {}
    for path, slots in model.by_path().items():
        found = [slot for slot in slots if slot.module in tensors]
        if not found:
            continue
        a = np.zeros((len(slots), slots[0].d_in, rank), np.float32)
        b = np.zeros((len(slots), rank, slots[0].d_out), np.float32)
        e, scale = np.zeros((len(slots), rank), np.float32), np.zeros(len(slots), np.float32)
        for slot in found:
            given, i = dict(tensors[slot.module]), slots.index(slot)
            values = take(model, slot, given, "lora_E", (None, 1))[:, 0]
            kept = _kept(slot, len(values), rank, masks, model)
            a[i, :, :kept] = take(model, slot, given, "lora_A", (kept, slot.d_in)).T
            b[i, :kept] = take(model, slot, given, "lora_B", (slot.d_out, kept)).T
            e[i, :kept], scale[i] = values, _scale(method)
            model.refuse_rest(slot, given)
        stack, d_in, d_out = model.dims(path)
        a, b = a.reshape(*stack, *d_in, rank), b.reshape(*stack, rank, *d_out)
        e = e.reshape(*stack, rank)
        zeros = Statistics(a=jnp.zeros(a.shape), e=jnp.zeros(e.shape), b=jnp.zeros(b.shape))
        nodes[path] = AdaLoRANode(
            a=jnp.asarray(a),
            e=jnp.asarray(e),
            b=jnp.asarray(b),
            scale=jnp.asarray(scale.reshape(stack)),
            mask=jnp.ones(e.shape),
            sensitivity=zeros,
            uncertainty=zeros,
            method=method,
            dropout=method.dropout,
            layout=model.layout(path),
        )
    return nodes


def _method(config: Mapping[str, Any], model: Model) -> AdaLoRA:
    """The method as the config states it. A schedule that only training would need, and that leaves
    it no step, becomes one that prunes nothing."""
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
    """Of rank_pattern, which triplets of each module are left, by the module's name."""
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
