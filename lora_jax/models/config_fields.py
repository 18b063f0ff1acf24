"""The fields that the configs of all decoders share, from and to a config.json."""

from typing import Any

from lora_jax.models.config import DecoderConfig
from lora_jax.models.config_json import Stated
from lora_jax.models.config_rope import context_of, rope_of, written_rope

Windows = tuple[int | None, ...]
FULL, SLIDING = "full_attention", "sliding_attention"


def read_fields(
    stated: Stated, *, default_theta: float = 10_000.0, is_partial: bool = False
) -> dict[str, Any]:
    """The fields of a `DecoderConfig`, by name. Where RoPE `is_partial`, it may turn a part of each
    head alone.

    Raises:
      ValueError: for a value of the wrong type.
    """
    hidden_size, num_heads = stated.count("hidden_size"), stated.count("num_attention_heads")
    rope = rope_of(stated, default_theta=default_theta, is_partial=is_partial)
    head_dim = stated.count("head_dim", hidden_size // num_heads)
    return {
        "vocab_size": stated.count("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": stated.count("intermediate_size"),
        "num_layers": stated.count("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": stated.count("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "context_length": context_of(stated, rope.scaling),
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
        "rope_dims": None if rope.fraction == 1 else int(rope.fraction * head_dim),
        "norm_eps": stated.number("rms_norm_eps"),
        "tie_embeddings": stated.flag("tie_word_embeddings"),
    }


def written_fields(config: DecoderConfig) -> dict[str, Any]:
    """What `read_fields` reads, of a model whose RoPE turns all of each head."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        **written_rope(config.rope_scaling, config.context_length),
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


def windows_of(layers: list[str], window: int | None) -> Windows | None:
    """For each layer the number of keys that a query sees, None for all; None where no layer
    slides."""
    if window is None or SLIDING not in layers:
        return None
    return tuple(window if layer == SLIDING else None for layer in layers)


def written_windows(windows: Windows | None, num_layers: int) -> dict[str, Any]:
    """The keys that hold them.

    Raises:
      ValueError: for windows of several widths, of which a config.json has one.
    """
    each = windows or (None,) * num_layers
    width = one_width(each)
    return {
        "sliding_window": width,
        "layer_types": [FULL if window is None else SLIDING for window in each],
    }


def one_width(windows: Windows | None) -> int | None:
    """The width that all layers with a window share; None where there is none.

    Raises:
      ValueError: for windows of several widths.
    """
    widths = {window for window in windows or () if window is not None}
    if len(widths) > 1:
        raise ValueError(f"windows={windows}: files have one width for all layers that slide one.")
    return next(iter(widths), None)
