"""IA3: a vector for each module, of its output, bias included, or of its input."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.interop.peft.config import target_modules
from lora_jax.interop.peft.model import Model, Tensors, layer_of, take
from lora_jax.interop.peft.names import Names
from lora_jax.methods import DeltaNode, IA3BiasNode, IA3InputNode, IA3Node
from lora_jax.paths import nest
from lora_jax.transform import Delta, delta_nodes


def scale_biases(delta: Delta, names: Names) -> Delta:
    """The delta with an entry for the bias behind each layer whose output IA3 scales.

    PEFT computes `(x @ w + bias) * l`; IA3 on the weight alone is `(x @ w) * l + bias`, for which
    PEFT has no form. `load_adapter` adds these entries. Add them to a fresh delta before training
    it for PEFT: they train nothing of their own.

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


def to_peft(nodes: Mapping[str, Any], model: Model) -> tuple[dict[str, Any], Tensors]:
    tensors, inputs = {}, []
    vectors = {path: node for path, node in nodes.items() if isinstance(node, IA3Node)}
    for path in vectors:
        _check_bias(path, nodes, model)
    for slot in model.slots_at(vectors):
        node = layer_of(nodes[slot.path], slot)
        if not np.any(np.asarray(node.active)):
            continue
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


def from_peft(
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
        kind = IA3InputNode if scales_input else IA3Node
        nodes[path] = kind(
            l=jnp.asarray(vectors.reshape(*stack, *(d_in if scales_input else d_out))),
            active=jnp.asarray(active.reshape(stack)),
            layout=model.layout(path),
        )
    return nodes


def _check_bias(path: str, nodes: Mapping[str, Any], model: Model) -> None:
    """PEFT's vector scales the bias as well."""
    node, bias = nodes[path], model.bias_of(path)
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
