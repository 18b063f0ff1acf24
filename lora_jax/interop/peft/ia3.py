"""IA3: a vector for each module, of its output, bias included, or of its input."""

from typing import Any

import jax
import numpy as np

from lora_jax.interop.peft.codec import Codec, Contents, Nodes
from lora_jax.interop.peft.config import target_modules
from lora_jax.interop.peft.layers import adapted_layers, linear_layers, refuse_rest, stacked, take
from lora_jax.interop.peft.model import Model
from lora_jax.interop.peft.names import Names, Slot
from lora_jax.interop.peft.stated_base import SHAPES
from lora_jax.methods import IA3BiasNode, IA3InputNode, IA3Node
from lora_jax.paths import nest
from lora_jax.transform import Delta, delta_nodes

_NAME, _SCALES_BIASES = "ia3_l", "lora_jax.ia3_scales_biases"


def scale_biases(delta: Delta, names: Names) -> Delta:
    """The delta with an entry for the bias of each layer whose output IA3 scales.

    PEFT computes `(x @ w + bias) * l`; IA3 on the weight alone is `(x @ w) * l + bias`, which PEFT
    does not have. `load_adapter` adds these entries. Add them to an initial delta before training
    it for PEFT: they have no parameters of their own.

    Args:
      delta: with IA3 at some paths.
      names: `{path: module}`, in which a bias is named as a tensor, `...q_proj.bias`.
    """
    nodes = delta_nodes(delta)
    paths = {name: path for path, name in names.items()}
    for path, node in list(nodes.items()):
        bias = paths.get(f"{names.get(path)}.bias")
        if isinstance(node, IA3Node) and not node.input and bias is not None:
            nodes.setdefault(bias, IA3BiasNode(of=path))
    return nest(nodes)


def _encode(nodes: Nodes, model: Model) -> Contents:
    vectors: Any = {path: node for path, node in nodes.items() if isinstance(node, IA3Node)}
    for path in vectors:
        _check_bias(path, nodes, model)
    layers = {slot: node for slot, node in linear_layers(vectors, model) if np.any(node.active)}
    config = {
        "feedforward_modules": target_modules(
            [slot.module for slot, node in layers.items() if node.input], list(model.slots)
        ),
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
    }
    modules = {
        slot.module: {_NAME: np.asarray(node.l)[None if node.input else (..., None)]}
        for slot, node in layers.items()
    }
    return Contents(config, modules, metadata={_SCALES_BIASES: "true"})


def _decode(contents: Contents, model: Model) -> dict[str, Any]:
    nodes: dict[str, Any] = {}
    for path, found in adapted_layers(contents.modules, model):
        first = next(iter(found.values()))
        kind = IA3InputNode if first.get(_NAME, np.zeros(2)).shape[:1] == (1,) else IA3Node
        layers: dict[Slot, Any] = {}
        for slot in model.by_path()[path]:
            width = slot.d_in if kind is IA3InputNode else slot.d_out
            layers[slot] = {"l": np.ones(width), "active": 0}
            if slot in found:
                shape = (1, width) if kind is IA3InputNode else (width, 1)
                vector = take(model, slot, found[slot], _NAME, shape)
                layers[slot] = {"l": vector.reshape(-1), "active": 1}
                refuse_rest(model, slot, found[slot])
        nodes[path] = stacked(model, path, kind, layers)
    # In files of version 0.1.0, IA3 does not scale the biases.
    if SHAPES in contents.metadata and _SCALES_BIASES not in contents.metadata:
        return nodes
    return delta_nodes(scale_biases(nest(nodes), model.names))


def _check_bias(path: str, nodes: Nodes, model: Model) -> None:
    """PEFT's vector scales the bias as well."""
    node: Any = nodes[path]
    bias = model.bias_of(path)
    if node.input or bias is None:
        return
    entry = nodes.get(bias)
    if isinstance(entry, IA3BiasNode) and entry.of == path:
        return
    leaf = model.leaf(bias)
    is_known = not isinstance(leaf, jax.ShapeDtypeStruct)
    if is_known and not np.any(np.asarray(leaf, np.float32)) and entry is None:
        return
    raise ValueError(
        f"{path}: PEFT's IA3 scales the layer's bias too, (x @ w + bias) * l, and this delta "
        f"leaves {bias} as it is, or moves it otherwise: PEFT has no form for it. Before training, "
        "scale the two together: delta = peft.scale_biases(delta, names). Of a trained one, merge "
        "it and export the merged model."
    )


CODEC = Codec(types=("IA3",), nodes=(IA3Node, IA3BiasNode), decode=_decode, encode=_encode)
