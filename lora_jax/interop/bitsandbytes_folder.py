"""The 4-bit linears of a Hugging Face folder, as transformers and bitsandbytes keep them there."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from safetensors import safe_open

from lora_jax.interop.llama_leaves import llama_leaves
from lora_jax.interop.placing import Place, StoredLeaf
from lora_jax.models.config import LlamaConfig
from lora_jax.paths import flatten
from lora_jax.quant import FP4, NF4, Blockwise, DoubleQuantized, from_bitsandbytes
from lora_jax.quant.bitsandbytes import quant_state
from lora_jax.weights import is_weight

_BLOCK_SIZES = tuple(2**power for power in range(5, 13))  # that bitsandbytes decodes
_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(?:nf4|fp4)")
_BESIDE = re.compile(_STATE.pattern + r"|(.+)\.(?:nested_)?(?:absmax|quant_map)")

Parts = Mapping[str, safe_open]  # the tensors of one matrix, and the open shard that holds each


def take_quantized(tensors: dict[str, safe_open]) -> dict[str, Parts]:
    """Takes every 4-bit matrix out of `tensors`, with what lies beside it, by its name."""
    states = map(_STATE.fullmatch, tensors)
    matrices: dict[str, dict[str, safe_open]] = {match[1]: {} for match in states if match}
    for name in list(tensors):
        match = _BESIDE.fullmatch(name)
        owner = match[1] or match[2] if match else name
        if owner in matrices:
            matrices[owner][name] = tensors.pop(name)
    return dict(matrices)


def quantized_shapes(matrices: Mapping[str, Parts], source: str) -> dict[str, tuple[int, ...]]:
    """The (out, in) shape of each matrix; ValueError if what states it is corrupt."""
    shapes = {}
    for name, parts in matrices.items():
        state = {part: file for part, file in parts.items() if _STATE.fullmatch(part)}
        try:
            shapes[name] = tuple(quant_state(_arrays(state), name)[1]["shape"])
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
    return shapes


def beside_quantized(
    config: LlamaConfig, matrices: Mapping[str, Parts], place: Place, source: str
) -> Place:
    """Makes the leaves of `matrices` their stacked NF4 or FP4 weights; `place` makes the others.

    Raises:
      ValueError: an embedding in 4 bits, or a leaf of which some layers are; when a leaf is placed,
        tensors that contradict each other.
    """
    names = {
        "/".join(leaf.path): leaf.names("huggingface", config.num_layers)
        for leaf in llama_leaves(config)
    }
    for path, layers in names.items():
        held = [name for name in layers if name in matrices]
        if held and (path == "embed" or len(held) < len(layers)):
            raise ValueError(
                f"{source}: {held[0]} is in 4 bits, but only a linear of which all layers are so "
                "can be loaded. Load the unquantised model, and quantise it here."
            )

    def place_either(path: str, leaf: StoredLeaf) -> Any:
        if names[path][0] not in matrices:
            return place(path, leaf)
        layers = []
        for name in names[path]:
            try:
                layers.append(from_bitsandbytes(_arrays(matrices[name]), name))
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from None
            leaf.on_read(leaf.nbytes // len(names[path]))
        if len(kinds := {str(layer): None for layer in layers}) > 1:
            raise ValueError(f"{source}: the layers of {path} differ: {', '.join(kinds)}.")
        return jax.tree.map(lambda *x: jnp.stack(x), *layers) if leaf.is_stacked else layers[0]

    return place_either


def quantization_config(params: Any, config: LlamaConfig, dtype: str) -> dict[str, Any] | None:
    """What config.json says of the 4-bit weights in `params`; None if there are none.

    Raises:
      ValueError: a weight that bitsandbytes, or its config, cannot say; the message names the path.
    """
    weights = {
        path: leaf
        for path, leaf in flatten(params, is_leaf=is_weight).items()
        if isinstance(leaf, Blockwise)
    }
    if not weights:
        return None
    for path, weight in weights.items():
        reason = _unsayable(path, weight)
        if reason:
            raise ValueError(
                f"{path} is {weight}: bitsandbytes {reason}. Quantise the model otherwise, or "
                "export dequantize(params)."
            )
    kinds = {(w.format, isinstance(w.absmax, DoubleQuantized)) for w in weights.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"the params hold {len(kinds)} kinds of 4-bit weights, and a checkpoint of "
            f"bitsandbytes one: {', '.join(map(str, weights.values()))}."
        )
    [(format, is_double)] = kinds
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": format,
        "bnb_4bit_use_double_quant": is_double,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": _plain_linears(config, weights),
    }


def _unsayable(path: str, weight: Blockwise) -> str | None:
    if not isinstance(weight, NF4 | FP4):
        return f"has no {weight.format}, only nf4 and fp4"
    if path == "embed":
        return "quantises no embedding"
    if weight.block_size not in _BLOCK_SIZES:
        return f"has blocks of {', '.join(map(str, _BLOCK_SIZES))}"
    return None


def _plain_linears(config: LlamaConfig, weights: Mapping[str, Blockwise]) -> list[str]:
    """The names of the linears left in floats; that of a tied head too, which is no leaf."""
    quantized = set(weights)
    linears = {
        "/".join(leaf.path): leaf.huggingface.split(".")[-2]
        for leaf in llama_leaves(config)
        if len(leaf.shape) == 2 and leaf.is_transposed
    }
    linears["lm_head"] = "lm_head"
    return [name for path, name in linears.items() if path not in quantized]


def _arrays(parts: Parts) -> dict[str, Any]:
    for name, file in parts.items():
        kind = file.get_slice(name).get_dtype()
        if kind not in ("U8", "F32"):
            raise ValueError(f"{name} is {kind}, expected U8 or F32 in a 4-bit checkpoint.")
    return {name: file.get_tensor(name) for name, file in parts.items()}
