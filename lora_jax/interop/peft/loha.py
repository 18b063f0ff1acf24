"""LoHa of linear layers: PEFT's `hada_wI_a` is our `bI` and `hada_wI_b` our `aI`, transposed."""

from typing import Any

import numpy as np

from lora_jax.interop.peft.codec import Codec, Contents, Nodes
from lora_jax.interop.peft.config import COUNT, NUMBER, NUMBERS, as_pattern, pattern_values
from lora_jax.interop.peft.layers import (
    adapted_layers,
    as_tensors,
    linear_layers,
    stacked,
    take_leaves,
)
from lora_jax.interop.peft.model import Model, Tensors
from lora_jax.methods import LoHaNode

_NAMES = {"a1": "hada_w1_b", "b1": "hada_w1_a", "a2": "hada_w2_b", "b2": "hada_w2_a"}


def _encode(nodes: Nodes, model: Model) -> Contents:
    """Our dropout, of the branch's input, is neither of PEFT's two, and is left out."""
    modules: dict[str, Tensors] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for slot, node in linear_layers(nodes, model):
        if not np.any(np.asarray(node.scale)):
            continue  # a layer without it
        rank = _used_rank(node)
        cut = node.replace(
            a1=node.a1[:, :rank], b1=node.b1[:rank], a2=node.a2[:, :rank], b2=node.b2[:rank]
        )
        modules[slot.module] = as_tensors(cut, _NAMES)
        ranks[slot.module], alphas[slot.module] = rank, float(node.scale) * rank
    rank, rank_pattern = as_pattern(ranks)
    alpha, alpha_pattern = as_pattern(alphas)
    config = {
        "r": rank,
        "alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        "use_effective_conv2d": False,
        "init_weights": True,
    }
    return Contents(config, modules)


def _decode(contents: Contents, model: Model) -> dict[str, Any]:
    config, modules = contents.config, contents.modules
    if config.get("r") is None or config.get("alpha") is None:
        raise ValueError(f"{model.source}: its config lacks r or alpha.")
    ranks = pattern_values(model.source, config, "rank_pattern", modules, config["r"])
    alphas = pattern_values(model.source, config, "alpha_pattern", modules, config["alpha"])
    nodes: dict[str, Any] = {}
    for path, found in adapted_layers(modules, model):
        layers = {}
        for slot, given in found.items():
            if (rank := ranks[slot.module]) < 1:
                raise ValueError(f"{model.source}: its config says rank {rank} of {slot.module}.")
            leaves = take_leaves(model, slot, given, LoHaNode, _NAMES, rank=rank)
            layers[slot] = leaves | {"scale": alphas[slot.module] / rank}
        nodes[path] = stacked(model, path, LoHaNode, layers)
    return nodes


def _used_rank(node: Any) -> int:
    """The rank without the padding to another layer's rank."""
    factors = np.concatenate([node.a1, node.b1.T, node.a2, node.b2.T])
    used = np.flatnonzero(np.any(factors != 0, axis=0))
    return int(used[-1]) + 1 if used.size else 1


CODEC = Codec(
    types=("LOHA",),
    nodes=(LoHaNode,),
    decode=_decode,
    encode=_encode,
    values={"r": COUNT, "alpha": NUMBER, "rank_pattern": NUMBERS, "alpha_pattern": NUMBERS},
)
