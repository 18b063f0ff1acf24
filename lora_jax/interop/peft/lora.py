"""LoRA and DoRA, as PEFT's type LORA. Its A is our `a` transposed, its B our `b`."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.interop.peft.config import as_pattern, pattern_values, target_modules
from lora_jax.interop.peft.model import Model, Tensors, layer_of, take
from lora_jax.interop.peft.names import HEAD, Slot
from lora_jax.methods import DeltaNode, DoRA, DoRANode, FullNode, LoRANode

# vLLM serves these ranks, one scale for all modules, and no magnitudes.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def to_peft(nodes: Mapping[str, DeltaNode], model: Model) -> tuple[dict[str, Any], Tensors]:
    """What began as PiSSA or OLoRA is written as the plain adapter of the original base that it is,
    of twice the rank."""
    kinds = {type(node) for node in nodes.values()}
    if len(kinds) > 1:
        raise ValueError(
            "PEFT's use_dora holds for a whole adapter: save the LoRA and the DoRA paths as two."
        )
    tensors: Tensors = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for slot in model.slots_at(nodes):
        node = layer_of(nodes[slot.path], slot)
        low = node
        if not np.any(np.asarray(low.scale)):
            continue  # a layer of rank 0
        a, b = used_factors(low)
        ranks[slot.module], alphas[slot.module] = len(b), _tidy(float(low.scale) * len(b))
        names = _names(slot)
        tensors |= {f"{slot.module}.{names[0]}": a.T, f"{slot.module}.{names[1]}": b.T}
        if isinstance(node, DoRANode):
            tensors[f"{slot.module}.lora_magnitude_vector"] = np.asarray(node.magnitude)
        if slot.is_embedding and model.is_tied:
            tensors |= _tied_head(slot, node, a, b)
            ranks[HEAD], alphas[HEAD] = ranks[slot.module], alphas[slot.module]
    if not ranks:
        raise ValueError("the delta adapts nothing: every layer's scale is zero.")
    rank, rank_pattern = as_pattern(ranks)
    alpha, alpha_pattern = as_pattern(alphas)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": max(node.dropout for node in nodes.values()),
        "use_dora": kinds == {DoRANode},
        "use_rslora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": target_modules([m for m in ranks if m in model.slots], list(model.slots)),
    }
    if model.is_tied and HEAD in ranks:
        config["ensure_weight_tying"] = True
    return config, tensors


def to_vllm(nodes: Mapping[str, DeltaNode], model: Model) -> tuple[dict[str, Any], Tensors]:
    """What vLLM reads: one rank that it accepts and one scale, of 1, folded into B."""
    if odd := sorted(path for path, node in nodes.items() if not isinstance(node, LoRANode)):
        raise ValueError(
            f"vLLM serves LoRA alone, and not {type(nodes[odd[0]]).__name__} on {odd[0]}. Merge "
            "the adapter and serve the merged model."
        )
    config, tensors = to_peft(nodes, model)
    if config.get("ensure_weight_tying"):
        raise ValueError(
            "vLLM serves no adapter of a table that is the output head as well. Merge the adapter "
            "and serve the merged model."
        )
    widest = max([config["r"], *config["rank_pattern"].values()])
    rank = next((rank for rank in VLLM_RANKS if rank >= widest), None)
    if rank is None:
        raise ValueError(f"vLLM serves ranks up to {VLLM_RANKS[-1]}, the adapter's is {widest}.")
    for slot in model.slots_at(nodes):
        (name_a, name_b), scale = _names(slot), float(layer_of(nodes[slot.path], slot).scale)
        if (a := tensors.get(f"{slot.module}.{name_a}")) is None:
            continue
        b = tensors[f"{slot.module}.{name_b}"] * np.float32(scale)
        missing = rank - len(a)
        tensors[f"{slot.module}.{name_a}"] = np.pad(a, ((0, missing), (0, 0)))
        tensors[f"{slot.module}.{name_b}"] = np.pad(b, ((0, 0), (0, missing)))
    config |= {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0}
    return config | {"rank_pattern": {}, "alpha_pattern": {}}, tensors


def from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, Tensors], model: Model
) -> dict[str, DeltaNode]:
    if config.get("r") is None or config.get("lora_alpha") is None:
        raise ValueError(f"{model.source}: its config lacks r or lora_alpha.")
    scaling = _Scaling(config, tensors, model.source)
    nodes: dict[str, DeltaNode] = {}
    for path, slots in model.by_path().items():
        if found := [slot for slot in slots if slot.module in tensors]:
            low = _low_rank(path, slots, found, scaling, tensors, model)
            nodes[path] = low
            if config.get("use_dora"):
                nodes[path] = _decomposed(path, low, slots, found, tensors, model)
            if config.get("lora_bias"):
                nodes |= _biases(path, low, slots, found, tensors, model)
    return nodes


def used_factors(low: LoRANode) -> tuple[np.ndarray, np.ndarray]:
    """`a [d_in, r]` and `b [r, d_out]` of one layer, of the same update, without the padding behind
    them (or behind either half, where they are a plain form of rank 2r)."""
    if low.a0 is not None and low.b0 is not None:
        trained = dataclasses.replace(low, a0=None, b0=None)
        first = dataclasses.replace(trained, a=low.a0, b=-low.b0)
        (a, b), (a0, b0) = used_factors(trained), used_factors(first)
        return np.concatenate([a, a0], axis=1), np.concatenate([b, b0])
    a, b = np.asarray(low.a), np.asarray(low.b)
    used = np.flatnonzero(np.any(a != 0, axis=0) | np.any(b != 0, axis=1))
    rank = int(used[-1]) + 1 if used.size else 1
    return a[:, :rank], b[:rank]


class _Scaling:
    """The rank and the scale that a config states for each module."""

    def __init__(self, config: Mapping[str, Any], modules: Iterable[str], source: str):
        self.config = config
        self._ranks = pattern_values(source, config, "rank_pattern", modules, config["r"])
        self._alphas = pattern_values(
            source, config, "alpha_pattern", modules, config["lora_alpha"]
        )

    def rank(self, module: str) -> int:
        return self._ranks[module]

    def scale(self, module: str, rank: int) -> float:
        root = math.sqrt(rank) if self.config.get("use_rslora") else rank
        return self._alphas[module] / root


def _low_rank(path, slots, found, scaling: _Scaling, tensors, model: Model) -> LoRANode:
    factors, scales, config = {}, {}, scaling.config
    beside = [
        name
        for name, field in (("lora_magnitude_vector", "use_dora"), ("lora_B.bias", "lora_bias"))
        if config.get(field)
    ]
    for slot in found:
        given, names = dict(tensors[slot.module]), _names(slot)
        if "lora_magnitude_vector" in given and not config.get("use_dora"):
            raise ValueError(
                f"{model.source}: {slot.module} has a lora_magnitude_vector, and its config says "
                "that use_dora is false: which of the two was trained?"
            )
        a, b = (take(model, slot, given, name, (None, None)) for name in names)
        rank = len(a)
        if a.shape != (rank, slot.d_in) or b.shape != (slot.d_out, rank) or not rank:
            raise ValueError(
                f"{model.source}: {slot.module} has A {a.shape} and B {b.shape}, expected "
                f"({rank}, {slot.d_in}) and ({slot.d_out}, {rank}). Is it an adapter of this base?"
            )
        if (stated := scaling.rank(slot.module)) != rank:
            raise ValueError(
                f"{model.source}: {slot.module} has rank {rank}, its config says {stated}."
            )
        scales[slot] = scaling.scale(slot.module, rank)
        factors[slot] = a.T, b.T
        model.refuse_rest(slot, given, also=tuple(beside))
    widest = max(a.shape[1] for a, _ in factors.values())
    whole_a = np.zeros((len(slots), slots[0].d_in, widest), np.float32)
    whole_b = np.zeros((len(slots), widest, slots[0].d_out), np.float32)
    scale = np.zeros(len(slots), np.float32)
    for i, slot in enumerate(slots):
        if slot in factors:
            a, b = factors[slot]
            whole_a[i, :, : a.shape[1]], whole_b[i, : len(b)], scale[i] = a, b, scales[slot]
    stack, d_in, d_out = model.dims(path)
    return LoRANode(
        a=jnp.asarray(whole_a.reshape(*stack, *d_in, widest)),
        b=jnp.asarray(whole_b.reshape(*stack, widest, *d_out)),
        scale=jnp.asarray(scale.reshape(stack)),
        dropout=float(config.get("lora_dropout") or 0.0),
        layout=model.layout(path),
    )


def _biases(path, low: LoRANode, slots, found, tensors, model: Model) -> dict[str, DeltaNode]:
    """PEFT's lora_bias: a constant that is added to the layer's output, scaled as B is."""
    place = model.bias_of(path)
    if place is None:
        raise ValueError(
            f"{model.source}: lora_bias adds a constant to the output of {found[0].module}, and "
            "this base has no bias there to add it to: there is no form for it here."
        )
    shifts, scale = np.zeros((len(slots), slots[0].d_out), np.float32), np.asarray(low.scale)
    for slot in found:
        given, i = dict(tensors[slot.module]), slots.index(slot)
        bias = take(model, slot, given, "lora_B.bias", (slot.d_out,))
        shifts[i] = bias * scale.reshape(-1)[i]
    return {place: FullNode(delta=jnp.asarray(shifts.reshape(model.leaf(place).shape)))}


def _decomposed(path, low: LoRANode, slots, found, tensors, model: Model) -> DeltaNode:
    base = model.leaf(path)
    if isinstance(base, jax.ShapeDtypeStruct):
        raise ValueError(f"{path}: DoRA needs the base's weights, found their shape alone.")
    keys = jax.random.split(jax.random.key(0), model.dims(path)[0])
    fresh: Any = DoRA(rank=1).init_node(path, base, layout=low.layout, key=keys)
    magnitude = np.array(fresh.magnitude).reshape(len(slots), -1)
    for slot in found:
        given = dict(tensors[slot.module])
        magnitude[slots.index(slot)] = take(
            model, slot, given, "lora_magnitude_vector", (slot.d_out,)
        )
    trained = jnp.asarray(magnitude.reshape(fresh.magnitude.shape))
    leaves = {field.name: getattr(low, field.name) for field in dataclasses.fields(low)}
    return DoRANode(**leaves, magnitude=trained, base_square=fresh.base_square)


def _tied_head(slot: Slot, node: Any, a: np.ndarray, b: np.ndarray) -> Tensors:
    """The head's factors, which `ensure_weight_tying` makes of the table's, transposed."""
    if isinstance(node, DoRANode):
        raise ValueError(
            f"{slot.path} is the output head as well, and PEFT's DoRA gives the two magnitudes "
            "apart. Leave it out, or untie the model first: models.untie(params, config)."
        )
    names = _names(dataclasses.replace(slot, module=HEAD))
    return {f"{HEAD}.{names[0]}": b, f"{HEAD}.{names[1]}": a}


def _names(slot: Slot) -> tuple[str, str]:
    if slot.is_embedding:
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def _tidy(alpha: float) -> float:
    return int(alpha) if alpha.is_integer() else alpha
