"""What GGUF files of Gemmas have in common: windows by a period, and a scale by the size."""

from collections.abc import Mapping
from typing import Any

from lora_jax.models.config_fields import Windows, one_width


def gguf_scalar(fields: Mapping[str, Any], wide: int) -> int:
    """Whose root divides scores: the head size, but of the model of `wide` layers the hidden size
    over the heads."""
    is_wide = fields["num_layers"] == wide
    return fields["hidden_size"] // fields["num_heads"] if is_wide else fields["head_dim"]


def gguf_windows(
    fields: Mapping[str, Any], metadata: Mapping[str, Any], period: int
) -> Windows | None:
    """Windows of all layers but the last of each period.

    Raises:
      ValueError: for a width that is no count.
    """
    width = metadata.get("attention.sliding_window")
    if type(width) is not int or width < 1:
        raise ValueError(f"attention.sliding_window is {width!r}, expected a positive count.")
    return _pattern(width, fields["num_layers"], period)


def gemma_metadata(config: Any, period: int, wide: int) -> dict[str, int | float]:
    """The keys of a model whose windows and scale are those of its size.

    Raises:
      ValueError: for others.
    """
    fields = {name: getattr(config, name) for name in ("num_layers", "hidden_size", "num_heads")}
    scalar = gguf_scalar(fields | {"head_dim": config.head_dim}, wide)
    width = one_width(config.windows)
    if width is None or config.windows != _pattern(width, config.num_layers, period):
        raise ValueError(
            f"windows={config.windows}: llama.cpp slides a window in all layers but every "
            f"{period}th. Write a Hugging Face folder, save_huggingface(folder, model)."
        )
    if config.attention_scalar != scalar:
        raise ValueError(
            f"attention_scalar={config.attention_scalar}: llama.cpp takes {scalar} for a model of "
            "this shape. Write a Hugging Face folder, save_huggingface(folder, model)."
        )
    return {"attention.sliding_window": width}


def _pattern(width: int, num_layers: int, period: int) -> Windows:
    return tuple(width if (i + 1) % period else None for i in range(min(num_layers, 1 << 16)))
