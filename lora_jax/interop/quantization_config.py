"""The quantization_config of a Hugging Face config, by which transformers loads 4-bit weights."""

from collections.abc import Mapping
from typing import Any

from lora_jax.models.config import DecoderConfig
from lora_jax.paths import flatten
from lora_jax.quant import FP4, NF4, Quantized
from lora_jax.weights import is_weight

_BLOCK_SIZES = tuple(2**power for power in range(5, 13))  # that bitsandbytes decodes


def quantization_config(params: Any, config: DecoderConfig, dtype: str) -> dict[str, Any] | None:
    """The quantization_config of the 4-bit weights in `params`; None if there are none.

    Raises:
      ValueError: a weight that bitsandbytes, or its config, cannot express; names the path.
    """
    weights = {
        path: leaf
        for path, leaf in flatten(params, is_leaf=is_weight).items()
        if isinstance(leaf, Quantized)
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
    formats = {(w.format, w.is_doubly_quantized) for w in weights.values()}
    if len(formats) > 1:
        raise ValueError(
            f"the params hold {len(formats)} formats of 4-bit weights, and a checkpoint of "
            f"bitsandbytes one: {', '.join(map(str, weights.values()))}."
        )
    [(format, is_double)] = formats
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


def _unsayable(path: str, weight: Quantized) -> str | None:
    if not isinstance(weight, NF4 | FP4):
        return f"has no {weight.format}, only nf4 and fp4"
    if path == "embed":
        return "quantises no embedding"
    if weight.block_size not in _BLOCK_SIZES:
        return f"has blocks of {', '.join(map(str, _BLOCK_SIZES))}"
    return None


def _plain_linears(config: DecoderConfig, weights: Mapping[str, Quantized]) -> list[str]:
    """The names of the linears left in floats; that of a tied head too, which is no leaf."""
    quantized = set(weights)
    linears = {
        leaf.path: leaf.huggingface.split(".")[-2]
        for leaf in config.family.parameters(config)
        if leaf.is_transposed
    }
    linears["lm_head"] = "lm_head"
    return [name for path, name in linears.items() if path not in quantized]
