"""The fields that the configs of all decoders share, from and to a config.json."""

from typing import Any

from lora_jax.models.config import DecoderConfig
from lora_jax.models.config_json import Stated
from lora_jax.models.config_rope import rope_of

FULL, SLIDING = "full_attention", "sliding_attention"


def read_fields(stated: Stated) -> dict[str, Any]:
    """The fields of a `DecoderConfig`, by name.

    Raises:
      ValueError: for a value of the wrong type.
    """
    hidden_size, num_heads = stated.count("hidden_size"), stated.count("num_attention_heads")
    rope_theta, rope_scaling = rope_of(stated)
    return {
        "vocab_size": stated.count("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": stated.count("intermediate_size"),
        "num_layers": stated.count("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": stated.count("num_key_value_heads", num_heads),
        "head_dim": stated.count("head_dim", hidden_size // num_heads),
        "context_length": stated.count("max_position_embeddings"),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "norm_eps": stated.number("rms_norm_eps"),
        "tie_embeddings": stated.flag("tie_word_embeddings"),
    }


def written_fields(config: DecoderConfig) -> dict[str, Any]:
    """What `read_fields` reads."""
    rope = config.rope_scaling
    return {
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
    }


def layer_types(stated: Stated, num_layers: int) -> list[str] | None:
    """Whether each layer's attention is full or slides a window; None where it is not stated.

    Raises:
      ValueError: for another type, or another number of layers.
    """
    layers = stated.get("layer_types")
    if layers is None:
        return None
    if not isinstance(layers, list) or not all(layer in (FULL, SLIDING) for layer in layers):
        raise ValueError(
            f"{stated.path}: layer_types is {layers!r}; supported: a list of {FULL!r} and, with "
            f"a sliding_window, {SLIDING!r}."
        )
    if len(layers) != num_layers:
        raise ValueError(
            f"{stated.path}: layer_types lists {len(layers)} layers, and num_hidden_layers is "
            f"{num_layers}."
        )
    return layers
