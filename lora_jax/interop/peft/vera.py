"""VeRA: two vectors for each module, and one pair of matrices for all."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.interop.peft.config import target_modules
from lora_jax.interop.peft.model import Model, Tensors, layer_of, take
from lora_jax.interop.peft.names import Slot
from lora_jax.methods import DeltaNode, VeRA, VeRANode, VeRAProjection

PAIR = ("base_model.vera_A", "base_model.vera_B")


def to_peft(
    nodes: Mapping[str, Any], pairs: Mapping[str, VeRAProjection], model: Model
) -> tuple[dict[str, Any], Tensors]:
    if len(pairs) != 1:
        raise ValueError(f"PEFT's VeRA shares one projection, the delta has {len(pairs)}.")
    (pair,) = pairs.values()
    tensors: Tensors = dict(zip(PAIR, (np.asarray(pair.a).T, np.asarray(pair.b).T), strict=True))
    modules = []
    for slot in model.slots_at(nodes):
        node = layer_of(nodes[slot.path], slot)
        tensors[f"{slot.module}.vera_lambda_d"] = np.asarray(node.lambda_d)
        tensors[f"{slot.module}.vera_lambda_b"] = np.asarray(node.lambda_b)
        modules.append(slot.module)
    config = {
        "peft_type": "VERA",
        "r": pair.a.shape[1],
        "target_modules": target_modules(modules, list(model.slots)),
        "vera_dropout": max(node.dropout for node in nodes.values()),
        "projection_prng_key": 0,
        "save_projection": True,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    return config, tensors


def from_peft(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensors],
    pair: Tensors,
    model: Model,
) -> dict[str, DeltaNode]:
    if set(pair) != set(PAIR):
        raise ValueError(
            f"{model.source} lacks the shared projection ({', '.join(PAIR)}), which cannot be "
            "drawn again here: save the adapter from PEFT with save_projection=True."
        )
    if any(pair[name].ndim != 2 for name in PAIR):
        raise ValueError(f"{model.source}: {', '.join(PAIR)} are no matrices.")
    a, b = (jnp.asarray(np.asarray(pair[name], np.float32).T) for name in PAIR)
    rank, dropout = a.shape[1], float(config.get("vera_dropout") or 0.0)
    place = VeRA(rank=rank, d_initial=config.get("d_initial") or 0.1, dropout=dropout).projection
    nodes: dict[str, DeltaNode] = {}
    for path, slots in model.by_path().items():
        found = [slot for slot in slots if slot.module in tensors]
        if not found:
            continue
        _check_pair(a, b, slots[0], model)
        lambda_d = np.zeros((len(slots), rank), np.float32)
        lambda_b = np.zeros((len(slots), slots[0].d_out), np.float32)
        for slot in found:
            given, i = dict(tensors[slot.module]), slots.index(slot)
            lambda_d[i] = take(model, slot, given, "vera_lambda_d", (rank,))
            lambda_b[i] = take(model, slot, given, "vera_lambda_b", (slot.d_out,))
            model.refuse_rest(slot, given)
        stack, _, d_out = model.dims(path)
        nodes[path] = VeRANode(
            lambda_d=jnp.asarray(lambda_d.reshape(*stack, rank)),
            lambda_b=jnp.asarray(lambda_b.reshape(*stack, *d_out)),
            path=place,
            dropout=dropout,
            layout=model.layout(path),
        )
    return nodes | {place: VeRAProjection(a=a, b=b)}


def _check_pair(a: jax.Array, b: jax.Array, slot: Slot, model: Model) -> None:
    if a.shape[0] < slot.d_in or b.shape[1] < slot.d_out or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"{model.source}: {PAIR[0]} has shape {a.shape[::-1]} and {PAIR[1]} {b.shape[::-1]}, "
            f"too small for {slot.module}, of {slot.d_in} inputs and {slot.d_out} outputs, or of "
            "two ranks. Is it an adapter of this base?"
        )
