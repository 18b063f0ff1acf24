"""AdaLoRA, with what its training would need to go on left fresh."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.interop.peft.config import target_modules
from lora_jax.interop.peft.model import Model, Tensors, layer_of, take
from lora_jax.methods import AdaLoRA, AdaLoRANode, DeltaNode

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
        tensors |= {
            f"{slot.module}.lora_A": np.asarray(node.a).T,
            f"{slot.module}.lora_E": np.asarray(node.e)[:, None],
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
    stated = {ours: config.get(theirs) for theirs, ours in _FIELDS.items()}
    method = AdaLoRA(**{field: value for field, value in stated.items() if value is not None})
    rank = method.rank
    narrowest = min(min(slot.d_in, slot.d_out) for slot in model.slots.values())
    if rank > narrowest:
        raise ValueError(f"{model.source}: init_r is {rank}, the smallest matrix has {narrowest}.")
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
            kept = len(values)
            a[i, :, :kept] = take(model, slot, given, "lora_A", (kept, slot.d_in)).T
            b[i, :kept] = take(model, slot, given, "lora_B", (slot.d_out, kept)).T
            e[i, :kept], scale[i] = values, method.alpha / (rank + 1e-5)
            model.refuse_rest(slot, given)
        stack, d_in, d_out = model.dims(path)
        a, b = a.reshape(*stack, *d_in, rank), b.reshape(*stack, rank, *d_out)
        e = e.reshape(*stack, rank)
        fresh = {"a": jnp.zeros(a.shape), "e": jnp.zeros(e.shape), "b": jnp.zeros(b.shape)}
        nodes[path] = AdaLoRANode(
            a=jnp.asarray(a),
            e=jnp.asarray(e),
            b=jnp.asarray(b),
            scale=jnp.asarray(scale.reshape(stack)),
            mask=jnp.ones(e.shape),
            sensitivity=fresh,
            uncertainty=dict(fresh),
            method=method,
            layout=model.layout(path),
        )
    return nodes
