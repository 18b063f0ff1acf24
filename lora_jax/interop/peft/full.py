"""Whole tensors in an adapter: PEFT's modules_to_save and trained biases, our `Full`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.interop.peft.model import Model, Tensors
from lora_jax.methods import FullNode


def to_peft(
    nodes: Mapping[str, FullNode], model: Model, adapted: set[str]
) -> tuple[dict[str, Any], Tensors]:
    """What adapter_config.json says of them, and the trained values.

    `adapted` are the modules that the adapter's own method is on: PEFT keeps their biases under
    another name.
    """
    tensors: Tensors = {}
    for path, node in nodes.items():
        if path not in model.names:
            raise ValueError(f"{path}: no PyTorch module is named for this path. Add it to names.")
        if isinstance(model.leaf(path), jax.ShapeDtypeStruct):
            raise ValueError(f"{path}: Full needs the base's weights, found their shape alone.")
        merged = np.asarray(node.merge(model.leaf(path)), np.float32)
        template = model.names[path]
        for layer in range(len(merged)) if "{}" in template else [None]:
            value = merged if layer is None else merged[layer]
            tensors[_tensor(template).format(layer)] = _turned(value, template)
    saved = sorted(name.removesuffix(".weight") for name in tensors if name.endswith(".weight"))
    config: dict[str, Any] = {"modules_to_save": saved or None}
    if biases := {name.removesuffix(".bias") for name in tensors if name.endswith(".bias")}:
        config["bias"] = "lora_only" if biases <= adapted else "all"
    for module in biases & adapted:
        tensors[f"{module}.base_layer.bias"] = tensors.pop(f"{module}.bias")
    return config, tensors


def from_peft(tensors: Tensors, model: Model) -> dict[str, FullNode]:
    """Removes from `tensors` what holds a whole leaf of the model, or a layer of one."""
    for name in [name for name in tensors if name.endswith(".base_layer.bias")]:
        tensors[name.replace(".base_layer.", ".")] = tensors.pop(name)
    found: dict[str, Any] = {}
    for path, template in model.names.items():
        leaf, stacked = model.leaf(path), "{}" in template
        for layer in range(leaf.shape[0]) if stacked else [None]:
            name = _tensor(template).format(layer)
            if name not in tensors:
                continue
            value = _turned(np.asarray(tensors.pop(name), np.float32), template)
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise ValueError(
                    f"{model.source}: {name} replaces a whole weight, for which the base's own "
                    "weights are needed, not their shapes alone."
                )
            base = np.asarray(leaf, np.float32)
            if value.shape != base[layer].shape if stacked else value.shape != base.shape:
                raise ValueError(
                    f"{model.source}: {name} has another shape than {path} of this base."
                )
            delta = found.setdefault(path, np.zeros(leaf.shape, np.float32))
            if stacked:
                delta[layer] = value - base[layer]
            else:
                delta[...] = value - base
    return {path: FullNode(delta=jnp.asarray(delta)) for path, delta in found.items()}


def _tensor(template: str) -> str:
    return template if template.endswith(".bias") else f"{template}.weight"


def _turned(value: np.ndarray, template: str) -> np.ndarray:
    """A matrix as PyTorch has it, (out, in), or back; a table lies alike in both."""
    is_table = template.endswith("embed_tokens")
    return np.ascontiguousarray(value.T) if value.ndim == 2 and not is_table else value
