"""IA3 and VeRA: vectors, one or two for each module, and VeRA's shared pair."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.interop.peft.config import target_modules
from lora_jax.interop.peft.model import Model, Tensors, layer_of, take
from lora_jax.methods import DeltaNode, IA3Node, VeRA, VeRANode, VeRAProjection

PAIR = ("base_model.vera_A", "base_model.vera_B")


def ia3_to_peft(nodes: Mapping[str, Any], model: Model) -> tuple[dict[str, Any], Tensors]:
    tensors, inputs = {}, []
    for slot in model.slots_at(nodes):
        node = layer_of(nodes[slot.path], slot)
        vector = np.asarray(node.l)
        tensors[f"{slot.module}.ia3_l"] = vector[None] if node.input else vector[:, None]
        inputs += [slot.module] if node.input else []
    modules = [name.rpartition(".")[0] for name in tensors]
    config = {
        "peft_type": "IA3",
        "target_modules": target_modules(modules, list(model.slots)),
        "feedforward_modules": target_modules(inputs, list(model.slots)),
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
    }
    return config, tensors


def ia3_from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, Tensors], model: Model
) -> dict[str, DeltaNode]:
    nodes: dict[str, DeltaNode] = {}
    for path, slots in model.by_path().items():
        found = [slot for slot in slots if slot.module in tensors]
        if not found:
            continue
        scales_input = tensors[found[0].module].get("ia3_l", np.zeros(2)).shape[:1] == (1,)
        width = slots[0].d_in if scales_input else slots[0].d_out
        vectors, active = np.ones((len(slots), width), np.float32), np.zeros(len(slots), np.float32)
        for slot in found:
            given, i = dict(tensors[slot.module]), slots.index(slot)
            shape = (1, width) if scales_input else (width, 1)
            vectors[i], active[i] = take(model, slot, given, "ia3_l", shape).reshape(-1), 1
            model.refuse_rest(slot, given)
        stack, d_in, d_out = model.dims(path)
        nodes[path] = IA3Node(
            l=jnp.asarray(vectors.reshape(*stack, *(d_in if scales_input else d_out))),
            active=jnp.asarray(active.reshape(stack)),
            input=scales_input,
            layout=model.layout(path),
        )
    return nodes


def vera_to_peft(
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


def vera_from_peft(
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
    a, b = (jnp.asarray(np.asarray(pair[name], np.float32).T) for name in PAIR)
    rank, dropout = a.shape[1], float(config.get("vera_dropout") or 0.0)
    place = VeRA(rank=rank, d_initial=config.get("d_initial") or 0.1, dropout=dropout).projection
    nodes: dict[str, DeltaNode] = {}
    for path, slots in model.by_path().items():
        found = [slot for slot in slots if slot.module in tensors]
        if not found:
            continue
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
