"""The model's shape, from and to a Hugging Face config.json."""

from pathlib import Path
from typing import Any

from lora_jax.interop.huggingface_keys import Stated, stated_values
from lora_jax.interop.huggingface_rope import rope_of
from lora_jax.interop.llama_leaves import family_of
from lora_jax.interop.read_json import read_json
from lora_jax.models.config import LlamaConfig

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_IN_FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
_FULL, _SLIDING = "full_attention", "sliding_attention"


def config_from_huggingface(folder: Path) -> LlamaConfig:
    """The model's shape, from config.json; refuses what our Llama has not, and what is not known.

    A sliding window below `max_position_embeddings` becomes the context: texts within it see what
    they would see without a window, and longer ones are refused by the model.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: another architecture, an unsupported or unknown option, or a value of the wrong
        type.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json; expected a Hugging Face model folder (config.json, "
            "*.safetensors, tokenizer.json)."
        )
    values = read_json(path)
    stated = stated_values(path, values)
    is_in_four_bits(path, values)
    family = stated.get("model_type")
    hidden_size, num_heads = stated.count("hidden_size"), stated.count("num_attention_heads")
    num_layers, context = stated.count("num_hidden_layers"), stated.count("max_position_embeddings")
    window = _window(stated, num_layers)
    rope_theta, rope_scaling = rope_of(stated)
    fields: dict[str, Any] = {
        "vocab_size": stated.count("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": stated.count("intermediate_size"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": stated.count("num_key_value_heads", num_heads),
        "head_dim": stated.count("head_dim", hidden_size // num_heads),
        "context_length": min(context, window or context),
        "attention_window": window,
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "norm_eps": stated.number("rms_norm_eps"),
        "tie_embeddings": stated.flag("tie_word_embeddings"),
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
    }
    try:
        return LlamaConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def is_in_four_bits(path: Path, values: dict[str, Any]) -> bool:
    """Whether a config.json says that bitsandbytes quantised the weights.

    Raises:
      ValueError: they are quantised otherwise.
    """
    quantization = values.get("quantization_config")
    if quantization is None:
        return False
    if not isinstance(quantization, dict) or not _IN_FOUR_BITS.items() <= quantization.items():
        raise ValueError(
            f"{path}: unsupported quantization_config={quantization!r} (supported: "
            f"{_IN_FOUR_BITS!r}, and none). Load the unquantised model, and quantise it here."
        )
    return True


def config_to_huggingface(config: LlamaConfig) -> dict[str, Any]:
    """The values of a config.json that transformers 4 and 5 read; Mistral's is a Llama's, unless
    it has a window.

    Raises:
      ValueError: no family has both biases and query/key norms.
    """
    family = family_of(config)
    windowed: dict[str, Any] = {}
    if config.attention_window is not None:
        family = "mistral" if family == "llama" else family
        windowed = {"sliding_window": config.attention_window}
        if family != "mistral":
            windowed |= {"use_sliding_window": True, "max_window_layers": 0}
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
        **windowed,
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


def _window(stated: Stated, num_layers: int) -> int | None:
    """The window that some layer slides.

    Qwen has a switch and a first layer for it. Mistral looks at neither, nor at layer_types; a
    Llama's window shortens the cache that it generates with.
    """
    family = stated.get("model_type")
    is_qwen = family in ("qwen2", "qwen3")
    given = (
        None if is_qwen and not stated.flag("use_sliding_window") else stated.get("sliding_window")
    )
    window = None if given is None else stated.count("sliding_window")
    layers = stated.get("layer_types")
    if layers is None:
        first = num_layers if window is None else 0
        if is_qwen and window is not None:
            first = stated.get("max_window_layers")
            if type(first) is not int:
                raise ValueError(f"{stated.path}: max_window_layers is {first!r}, not a count.")
        layers = [_SLIDING if i >= first else _FULL for i in range(min(num_layers, 1 << 16))]
    elif not isinstance(layers, list) or not all(kind in (_FULL, _SLIDING) for kind in layers):
        raise ValueError(
            f"{stated.path}: layer_types is {layers!r}; supported: a list of {_FULL!r} and, with "
            f"a sliding_window, {_SLIDING!r}."
        )
    elif len(layers) != num_layers:
        raise ValueError(
            f"{stated.path}: layer_types lists {len(layers)} layers, and num_hidden_layers is "
            f"{num_layers}."
        )
    slides = _SLIDING in layers
    if slides and window is None:
        raise ValueError(
            f"{stated.path}: layer_types names {_SLIDING!r} without a sliding_window in use."
        )
    slides |= family == "mistral" and window is not None
    return window if slides else None
