"""The model's shape, from and to a Hugging Face config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.interop.llama_leaves import family_of
from lora_jax.interop.read_json import read_json
from lora_jax.models.config import LlamaConfig, RopeScaling

_QWEN = {
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
}
# What transformers takes where a family's config.json leaves a key out.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_SUPPORTED = {
    "hidden_act": "silu",
    "attention_bias": False,  # Qwen2's biases have no switch
    "mlp_bias": False,
    "pretraining_tp": 1,
}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_FULL, _SLIDING = "full_attention", "sliding_attention"
_LARGEST = 1 << 31  # no count in a config is larger; a flipped digit is


def config_from_huggingface(folder: Path) -> LlamaConfig:
    """The model's shape, from config.json; refuses options that our Llama has not.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: another architecture, an unsupported option, or a value of the wrong kind.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json; expected a Hugging Face model folder (config.json, "
            "*.safetensors, tokenizer.json)."
        )
    stated = read_json(path)
    _refuse_other_models(path, stated)
    family = stated["model_type"]
    values = {**_FAMILIES[family], **stated}
    _refuse_window(path, values)

    def number(key: str, default: float | None = None) -> float:
        return _positive(path, values, key, default)

    def count(key: str, default: int | None = None) -> int:
        value = number(key, default)
        if value != int(value) or value > _LARGEST:
            raise ValueError(f"{path}: {key} is {value!r}, expected a count below {_LARGEST}.")
        return int(value)

    hidden_size, num_heads = count("hidden_size"), count("num_attention_heads")
    rope_theta, rope_scaling = _rope(path, values)
    fields: dict[str, Any] = {
        "vocab_size": count("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": count("intermediate_size"),
        "num_layers": count("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": count("num_key_value_heads", num_heads),
        "head_dim": count("head_dim", hidden_size // num_heads),
        "context_length": count("max_position_embeddings"),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "norm_eps": number("rms_norm_eps", 1e-6),
        "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
    }
    try:
        return LlamaConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def config_to_huggingface(config: LlamaConfig) -> dict[str, Any]:
    """The values of a config.json that transformers 4 and 5 read; Mistral's is a Llama's.

    Raises:
      ValueError: no family has both biases and query/key norms.
    """
    family = family_of(config)
    rope = config.rope_scaling
    return {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope
        and {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_context,
        },
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
    }


def _refuse_other_models(path: Path, values: Mapping[str, Any]) -> None:
    family = values.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise ValueError(
            f"{path}: unsupported model_type={family!r} (supported: "
            f"{', '.join(map(repr, _FAMILIES))}): Llama 2, Llama 3.x, SmolLM2, Mistral, Qwen2, "
            "Qwen2.5 and Qwen3 checkpoints can be loaded."
        )
    quantization = values.get("quantization_config")
    in_four_bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    if quantization is not None and not (
        isinstance(quantization, dict) and in_four_bits.items() <= quantization.items()
    ):
        raise ValueError(
            f"{path}: unsupported quantization_config={quantization!r} (supported: "
            f"{in_four_bits!r}, and none). Load the unquantised model, and quantise it here."
        )
    wrong = [
        f"{key}={values[key]!r} (supported: {supported!r})"
        for key, supported in _SUPPORTED.items()
        if values.get(key, supported) != supported
    ]
    if wrong:
        raise ValueError(f"{path}: unsupported {', '.join(wrong)} in a model of type {family!r}.")


def _refuse_window(path: Path, values: Mapping[str, Any]) -> None:
    """A sliding window as long as the context hides nothing; our Llama has no shorter one."""
    window = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    layers = values.get("layer_types") or [_FULL if window is None else _SLIDING]
    if not isinstance(layers, list) or not all(kind in (_FULL, _SLIDING) for kind in layers):
        raise ValueError(f"{path}: layer_types is {layers!r}; supported: a list of {_FULL!r}.")
    context = _positive(path, values, "max_position_embeddings")
    is_whole = window is not None and _positive(path, values, "sliding_window") >= context
    if _SLIDING in layers and not is_whole:
        raise ValueError(
            f"{path}: sliding_window={window!r} is not supported below the context, "
            f"max_position_embeddings={context}. For texts of at most that window, set "
            "max_position_embeddings to it, or sliding_window to null."
        )


def _positive(
    path: Path, values: Mapping[str, Any], key: str, default: float | None = None
) -> float:
    value = default if values.get(key) is None else values[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise ValueError(f"{path}: {key} is {value!r}, expected a positive number.")
    return value


def _rope(path: Path, values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling; transformers 5 keeps both in rope_parameters, before it they lay apart."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: the RoPE scaling is {rope!r}, expected an object.")
    holder = values if rope.get("rope_theta") is None else rope
    theta = _positive(path, holder, "rope_theta", 10_000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise ValueError(
            f"{path}: RoPE scaling {kind!r} is not supported; supported: 'default' and 'llama3'."
        )
    if missing := [name for name in _LLAMA3 if name not in rope]:
        raise ValueError(f"{path}: the RoPE scaling 'llama3' lacks {', '.join(missing)}.")
    factor, low, high, original = (_positive(path, rope, name) for name in _LLAMA3)
    return float(theta), RopeScaling(
        factor=float(factor),
        low_freq_factor=float(low),
        high_freq_factor=float(high),
        original_context=int(original),
    )
