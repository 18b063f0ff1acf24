"""LoRA and DoRA, as PEFT's type LORA. Its A is our `a` transposed, its B our `b`."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.interop.peft.codec import Codec, Contents
from lora_jax.interop.peft.config import (
    COUNT,
    NUMBER,
    NUMBERS,
    SWITCH,
    UNSUPPORTED,
    Allowed,
    as_pattern,
    one_of,
    pattern_values,
)
from lora_jax.interop.peft.layers import adapted_layers, layer_of, refuse_rest, stacked, take
from lora_jax.interop.peft.model import Model, Tensors
from lora_jax.interop.peft.names import HEAD, Slot
from lora_jax.methods import DoRA, DoRANode, FullNode, LoRANode

# vLLM serves these ranks, one scale for all modules, and no magnitudes.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_MAGNITUDE = "lora_magnitude_vector"
# Inits that move a part of the base into the factors: the adapter fits that other base alone.
_MOVES_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
VALUES = {
    "r": COUNT,
    "lora_alpha": NUMBER,
    "lora_dropout": NUMBER,
    "rank_pattern": NUMBERS,
    "alpha_pattern": NUMBERS,
    "bias": one_of("none", "all", "lora_only"),
    **dict.fromkeys(("use_dora", "use_rslora", "lora_bias", "ensure_weight_tying"), SWITCH),
    "init_lora_weights": Allowed(
        lambda init: not (isinstance(init, str) and init.lower().startswith(_MOVES_THE_BASE)),
        "{field}={value} has moved a part of the base into the adapter, which fits that changed "
        "base alone. Save it from PEFT as a plain LoRA: "
        "save_pretrained(..., path_initial_model_for_weight_conversion=...).",
    ),
    **dict.fromkeys(
        (
            "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication",
            "megatron_config", "monteclora_config", "target_parameters", "use_bdlora",
            "use_qalora", "velora_config",
        ),
        UNSUPPORTED,
    ),
}  # fmt: skip


def _encode(nodes: Mapping[str, Any], model: Model) -> Contents:
    """A node that was initialised by PiSSA or OLoRA is written as the equivalent plain LoRA of the
    original base, of twice the rank."""
    classes = {type(node) for node in nodes.values()}
    if len(classes) > 1:
        raise ValueError(
            "PEFT's use_dora holds for a whole adapter: save the LoRA and the DoRA paths as two."
        )
    modules: dict[str, Tensors] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for slot in model.slots_at(nodes):
        low = layer_of(nodes[slot.path], slot)
        if not np.any(np.asarray(low.scale)):
            continue  # a layer of rank 0
        a, b = used_factors(low)
        ranks[slot.module], alphas[slot.module] = len(b), tidy(float(low.scale) * len(b))
        modules[slot.module] = dict(zip(_names(slot), (a.T, b.T), strict=True))
        if isinstance(low, DoRANode):
            modules[slot.module][_MAGNITUDE] = np.asarray(low.magnitude)
        if slot.is_embedding and model.is_tied:
            modules[HEAD] = _tied_head(slot, low, a, b)
            ranks[HEAD], alphas[HEAD] = ranks[slot.module], alphas[slot.module]
    rank, rank_pattern = as_pattern(ranks)
    alpha, alpha_pattern = as_pattern(alphas)
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": max(node.dropout for node in nodes.values()),
        "use_dora": classes == {DoRANode},
        "use_rslora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_lora_weights": True,
    }
    if model.is_tied and HEAD in ranks:
        config["ensure_weight_tying"] = True
    return Contents(config, modules)


def _encode_vllm(nodes: Mapping[str, Any], model: Model) -> Contents:
    """In vLLM's format: one rank that it accepts and one scale, of 1, folded into B."""
    if odd := sorted(path for path, node in nodes.items() if not isinstance(node, LoRANode)):
        raise ValueError(
            f"vLLM serves LoRA alone, and not {type(nodes[odd[0]]).__name__} on {odd[0]}. Merge "
            "the adapter and serve the merged model."
        )
    contents = _encode(nodes, model)
    config = dict(contents.config)
    if config.get("ensure_weight_tying"):
        raise ValueError(
            "vLLM serves no adapter of a table that is the output head as well. Merge the adapter "
            "and serve the merged model."
        )
    widest = max([config["r"], *config["rank_pattern"].values()])
    rank = next((rank for rank in VLLM_RANKS if rank >= widest), None)
    if rank is None:
        raise ValueError(f"vLLM serves ranks up to {VLLM_RANKS[-1]}, the adapter's is {widest}.")
    modules: dict[str, Tensors] = {}
    for module, tensors in contents.modules.items():
        slot = model.slots[module]
        (name_a, a), (name_b, b) = tensors.items()
        scale, missing = np.float32(layer_of(nodes[slot.path], slot).scale), rank - len(a)
        modules[module] = {
            name_a: np.pad(a, ((0, missing), (0, 0))),
            name_b: np.pad(b * scale, ((0, 0), (0, missing))),
        }
    config |= {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0}
    return Contents(config | {"rank_pattern": {}, "alpha_pattern": {}}, modules)


def _decode(contents: Contents, model: Model) -> dict[str, Any]:
    config = contents.config
    if config.get("r") is None or config.get("lora_alpha") is None:
        raise ValueError(f"{model.source}: its config lacks r or lora_alpha.")
    scaling = _Scaling(config, contents.modules, model.source)
    nodes: dict[str, Any] = {}
    for path, found in adapted_layers(contents.modules, model):
        dropout = float(config.get("lora_dropout") or 0.0)
        layers = {slot: _factors(slot, given, scaling, model) for slot, given in found.items()}
        nodes[path] = low = stacked(model, path, LoRANode, layers, dropout=dropout)
        if config.get("use_dora"):
            nodes[path] = _decomposed(path, low, found, model)
        if config.get("lora_bias"):
            nodes |= _biases(path, low, found, model)
        for slot, given in found.items():
            refuse_rest(model, slot, given)
    return nodes


def used_factors(low: LoRANode) -> tuple[np.ndarray, np.ndarray]:
    """`a [d_in, r]` and `b [r, d_out]` of one layer, of the same update, without the padding at
    their end (or at the end of either half, where they are a plain LoRA of rank 2r)."""
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


def _factors(slot: Slot, given: Tensors, scaling: _Scaling, model: Model) -> dict[str, Any]:
    if _MAGNITUDE in given and not scaling.config.get("use_dora"):
        raise ValueError(
            f"{model.source}: {slot.module} has a {_MAGNITUDE}, and its config says that use_dora "
            "is false: which of the two was trained?"
        )
    a, b = (take(model, slot, given, name, (None, None)) for name in _names(slot))
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
    return {"a": a.T, "b": b.T, "scale": scaling.scale(slot.module, rank)}


def _biases(
    path: str, low: LoRANode, found: Mapping[Slot, Tensors], model: Model
) -> dict[str, FullNode]:
    """PEFT's lora_bias: a constant that is added to the layer's output, scaled as B is."""
    place, slots = model.bias_of(path), model.by_path()[path]
    if place is None:
        raise ValueError(
            f"{model.source}: lora_bias adds a constant to the output of {slots[0].module}, and "
            "this base has no bias there to add it to: there is no form for it here."
        )
    shifts, scale = np.zeros((len(slots), slots[0].d_out), np.float32), np.asarray(low.scale)
    for slot, given in found.items():
        bias = take(model, slot, given, "lora_B.bias", (slot.d_out,))
        shifts[slots.index(slot)] = bias * scale.reshape(-1)[slots.index(slot)]
    return {place: FullNode(delta=jnp.asarray(shifts.reshape(model.leaf(place).shape)))}


def _decomposed(path: str, low: LoRANode, found: Mapping[Slot, Tensors], model: Model) -> DoRANode:
    base, slots = model.leaf(path), model.by_path()[path]
    if isinstance(base, jax.ShapeDtypeStruct):
        raise ValueError(f"{path}: DoRA needs the base's weights, found their shape alone.")
    keys = jax.random.split(jax.random.key(0), model.dims(path)[0])
    initial: Any = DoRA(rank=1).init_node(path, base, layout=low.layout, key=keys)
    magnitude = np.array(initial.magnitude).reshape(len(slots), -1)
    for slot, given in found.items():
        magnitude[slots.index(slot)] = take(model, slot, given, _MAGNITUDE, (slot.d_out,))
    trained = jnp.asarray(magnitude.reshape(initial.magnitude.shape))
    leaves = {field.name: getattr(low, field.name) for field in dataclasses.fields(low)}
    return DoRANode(**leaves, magnitude=trained, base_square=initial.base_square)


def _tied_head(slot: Slot, node: Any, a: np.ndarray, b: np.ndarray) -> Tensors:
    """The head's factors: those of the table, transposed, as `ensure_weight_tying` has them."""
    if isinstance(node, DoRANode):
        raise ValueError(
            f"{slot.path} is the output head as well, and PEFT's DoRA gives the two magnitudes "
            "apart. Leave it out, or untie the model first: models.untie(params, config)."
        )
    names = _names(dataclasses.replace(slot, module=HEAD))
    return dict(zip(names, (b, a), strict=True))


def _names(slot: Slot) -> tuple[str, str]:
    if slot.is_embedding:
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def tidy(alpha: float) -> float:
    return int(alpha) if alpha.is_integer() else alpha


CODEC = Codec(
    types=("LORA",),
    nodes=(LoRANode, DoRANode),
    decode=_decode,
    encode=_encode,
    encode_vllm=_encode_vllm,
    values=VALUES,
    own_biases="lora_only",
    ties_head=True,
)
