"""The fields of a LlamaConfig from and to config.json and GGUF files, of five model types."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from lora_jax.models.config_fields import (
    FULL,
    SLIDING,
    Windows,
    layer_types,
    one_width,
    read_fields,
    windows_of,
    written_fields,
    written_windows,
)
from lora_jax.models.config_json import Stated

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def _type_of(config: Any) -> str:
    """What config.json calls models of this shape.

    Raises:
      ValueError: none has all that this shape has.
    """
    windows = config.windows is not None
    is_mixed = windows and len({*config.windows}) > 1
    kinds = {
        "llama": not config.qk_norm and config.qkv_bias == config.o_bias and not windows,
        "mistral": not (config.qk_norm or config.qkv_bias or config.o_bias or is_mixed),
        "ministral": not (config.qk_norm or config.qkv_bias or config.o_bias),
        "qwen2": config.qkv_bias and not config.o_bias and not config.qk_norm,
        "qwen3": config.qk_norm and config.qkv_bias == config.o_bias,
    }
    for name, fits in kinds.items():
        if fits and (name == "llama" or not config.mlp_bias):
            return name
    raise ValueError(
        f"no family has qkv_bias={config.qkv_bias}, o_bias={config.o_bias}, mlp_bias="
        f"{config.mlp_bias}, qk_norm={config.qk_norm} and windows={config.windows} together; no "
        "other program would load it."
    )


def fields_of(stated: Stated) -> dict[str, Any]:
    """The fields that a config.json states.

    Raises:
      ValueError: for a value of the wrong type, or windows that contradict themselves.
    """
    fields, name = read_fields(stated), stated.get("model_type")
    windows = _windows(stated, fields["num_layers"])
    if name == "llama" and windows is not None:
        # A Llama attends to all keys of a row and generates with those in the window, so that the
        # two agree within it alone.
        width = one_width(windows) or fields["context_length"]
        fields |= {"context_length": min(fields["context_length"], width)}
        windows = None
    has_bias = name in ("llama", "qwen3") and stated.switch("attention_bias")
    return fields | {
        "windows": windows,
        "qkv_bias": name == "qwen2" or has_bias,
        "o_bias": has_bias,
        "mlp_bias": name == "llama" and stated.switch("mlp_bias"),
        "qk_norm": name == "qwen3",
    }


def _windows(stated: Stated, num_layers: int) -> Windows | None:
    """Qwen has a switch and a first layer for them. Mistral reads neither; with layer_types it is
    what transformers calls a Ministral."""
    family = stated.get("model_type")
    is_qwen = family in ("qwen2", "qwen3")
    given = (
        None if is_qwen and not stated.flag("use_sliding_window") else stated.get("sliding_window")
    )
    window = None if given is None else stated.count("sliding_window")
    layers = layer_types(stated, num_layers)
    if layers is None:
        first = num_layers if window is None else 0
        if is_qwen and window is not None:
            first = stated.get("max_window_layers")
            if type(first) is not int:
                raise ValueError(f"{stated.path}: max_window_layers is {first!r}, not a count.")
        layers = [SLIDING if i >= first else FULL for i in range(min(num_layers, 1 << 16))]
    if SLIDING in layers and window is None:
        raise ValueError(
            f"{stated.path}: layer_types names {SLIDING!r} without a sliding_window in use."
        )
    return windows_of(layers, window)


def config_json(config: Any) -> dict[str, Any]:
    """What transformers 4 and 5 read."""
    name = _type_of(config)
    windowed: dict[str, Any] = {}
    if name == "mistral":
        windowed = {"sliding_window": one_width(config.windows)}
    elif config.windows is not None:
        windowed = written_windows(config.windows, config.num_layers)
        if name != "ministral":
            windowed |= {"use_sliding_window": True, "max_window_layers": 0}
    return {
        "architectures": [_ARCHITECTURES[name]],
        "model_type": name,
        **written_fields(config),
        **windowed,
        "hidden_act": "silu",
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
    }


def architecture_of(config: Any) -> str:
    """Its value of llama.cpp's `general.architecture`.

    Raises:
      ValueError: llama.cpp has none of this shape.
    """
    one = dataclasses.replace(config, windows=None)
    name = _type_of(one)
    if name == "qwen3" and config.qkv_bias:
        raise ValueError("llama.cpp reads no biases of attention in a qwen3.")
    return name


def fields_of_gguf(
    architecture: str,
    fields: dict[str, Any],
    metadata: Mapping[str, Any],
    tensors: Collection[str],
) -> dict[str, Any]:
    """`fields` and those that follow from a file's own keys and tensors."""
    window = metadata.get("attention.sliding_window")
    if type(window) not in (type(None), int) or (window or 0) < 0:
        raise ValueError(f"attention.sliding_window is {window!r}, expected a count.")
    return fields | {
        "windows": (window,) * min(fields["num_layers"], 1 << 16) if window else None,
        "qkv_bias": "blk.0.attn_q.bias" in tensors,
        "o_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "qk_norm": architecture == "qwen3",
    }


def gguf_metadata(config: Any) -> dict[str, int | float]:
    """llama.cpp slides no window in these: the context that it gets is the window."""
    if config.windows is None:
        return {}
    width = one_width(config.windows)
    if width is None or None in config.windows:
        raise ValueError(
            f"windows={config.windows}: llama.cpp has no layers with a window beside layers "
            f"without one in a {architecture_of(config)}. Write a Hugging Face folder, "
            "save_huggingface(folder, model)."
        )
    context = min(config.context_length, width)
    return {"attention.sliding_window": width, "context_length": context}
