"""VeRA: two vectors for each module, and one pair of matrices for all."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.interop.peft.codec import Codec, Contents, Nodes
from lora_jax.interop.peft.config import NUMBER, one_of
from lora_jax.interop.peft.layers import (
    adapted_layers,
    as_tensors,
    linear_layers,
    stacked,
    take_leaves,
)
from lora_jax.interop.peft.model import Model
from lora_jax.interop.peft.names import Slot
from lora_jax.methods import VeRA, VeRANode, VeRAProjection

_PAIR = ("base_model.vera_A", "base_model.vera_B")
_NAMES = {"lambda_d": "vera_lambda_d", "lambda_b": "vera_lambda_b"}


def _encode(nodes: Nodes, model: Model) -> Contents:
    pairs = [node for node in nodes.values() if isinstance(node, VeRAProjection)]
    vectors: Any = {path: node for path, node in nodes.items() if isinstance(node, VeRANode)}
    if len(pairs) != 1:
        raise ValueError(f"PEFT's VeRA shares one projection, the delta has {len(pairs)}.")
    (pair,) = pairs
    config = {
        "r": pair.a.shape[1],
        "vera_dropout": max(node.dropout for node in vectors.values()),
        "projection_prng_key": 0,
        "save_projection": True,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    return Contents(
        config,
        {slot.module: as_tensors(node, _NAMES) for slot, node in linear_layers(vectors, model)},
        own=dict(zip(_PAIR, (np.asarray(pair.a).T, np.asarray(pair.b).T), strict=True)),
    )


def _decode(contents: Contents, model: Model) -> dict[str, Any]:
    config, pair = contents.config, contents.own
    if set(pair) != set(_PAIR):
        raise ValueError(
            f"{model.source} lacks the shared projection ({', '.join(_PAIR)}), which cannot be "
            "computed again here: save the adapter from PEFT with save_projection=True."
        )
    if any(pair[name].ndim != 2 for name in _PAIR):
        raise ValueError(f"{model.source}: {', '.join(_PAIR)} are no matrices.")
    a, b = (jnp.asarray(np.asarray(pair[name], np.float32).T) for name in _PAIR)
    rank, dropout = a.shape[1], float(config.get("vera_dropout") or 0.0)
    place = VeRA(rank=rank, d_initial=config.get("d_initial") or 0.1, dropout=dropout).projection
    nodes: dict[str, Any] = {}
    for path, found in adapted_layers(contents.modules, model):
        _check_pair(a, b, next(iter(found)), model)
        layers = {
            slot: take_leaves(model, slot, given, VeRANode, _NAMES, rank=rank)
            for slot, given in found.items()
        }
        nodes[path] = stacked(model, path, VeRANode, layers, path=place, dropout=dropout)
    return nodes | {place: VeRAProjection(a=a, b=b)}


def _check_pair(a: jax.Array, b: jax.Array, slot: Slot, model: Model) -> None:
    if a.shape[0] < slot.d_in or b.shape[1] < slot.d_out or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"{model.source}: {_PAIR[0]} has shape {a.shape[::-1]} and {_PAIR[1]} {b.shape[::-1]}, "
            f"too small for {slot.module}, of {slot.d_in} inputs and {slot.d_out} outputs, or of "
            "two ranks. Is it an adapter of this base?"
        )


CODEC = Codec(
    types=("VERA",),
    nodes=(VeRANode, VeRAProjection),
    decode=_decode,
    encode=_encode,
    values={
        "vera_dropout": NUMBER,
        "d_initial": NUMBER,
        "bias": one_of("none", "all", "vera_only"),
    },
    own=_PAIR,
    own_biases="vera_only",
)
