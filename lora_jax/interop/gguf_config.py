"""The model's shape, from the metadata of a GGUF file."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.interop.gguf_header import Header
from lora_jax.interop.gguf_keys import check_keys
from lora_jax.interop.gguf_rope import scaling_from_gguf
from lora_jax.models.config import DecoderConfig
from lora_jax.models.families import ARCHITECTURES


def config_from_gguf(path: Path, header: Header) -> DecoderConfig:
    """The model's shape, from a GGUF's metadata and its tensor table."""
    metadata = header.metadata
    family = metadata.get("general.architecture")
    if family not in ARCHITECTURES:
        raise ValueError(
            f"{path} holds the architecture {family!r}; supported: "
            f"{', '.join(map(repr, ARCHITECTURES))}."
        )

    def count(key: str, default: int | None = None) -> int:
        return _positive(path, metadata, f"{family}.{key}", default, int)

    hidden_size, num_heads = count("embedding_length"), count("attention.head_count")
    head_dim = count("attention.key_length", hidden_size // num_heads)
    rope_theta = _positive(path, metadata, f"{family}.rope.freq_base", 10_000.0, float)
    dims, context = count("rope.dimension_count", head_dim), count("context_length")
    check_keys(path, metadata, family, head_dim)
    fields = {
        "vocab_size": _vocab_size(path, header),
        "hidden_size": hidden_size,
        "intermediate_size": count("feed_forward_length"),
        "num_layers": count("block_count"),
        "num_heads": num_heads,
        "num_kv_heads": count("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "context_length": context,
        "rope_theta": rope_theta,
        "rope_scaling": scaling_from_gguf(path, header, rope_theta, dims, context),
        "rope_dims": None if dims == head_dim else dims,
        "norm_eps": _positive(
            path, metadata, f"{family}.attention.layer_norm_rms_epsilon", None, float
        ),
        "tie_embeddings": "output.weight" not in header.tensors,
    }
    own = {
        key.removeprefix(f"{family}."): value
        for key, value in metadata.items()
        if key.startswith(f"{family}.")
    }
    try:
        return ARCHITECTURES[family].read(family, fields, own, header.tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _positive(
    path: Path, metadata: Mapping[str, Any], key: str, default: Any, kind: type[int] | type[float]
) -> Any:
    value = metadata.get(key, default)
    if type(value) is not kind or not 0 < value < math.inf:
        raise ValueError(f"{path}: {key} is {value!r}, expected a positive {kind.__name__}.")
    # Metadata is float32: 9.999999747378752e-06 was written as 1e-05.
    return float(str(np.float32(value))) if kind is float else value


def _vocab_size(path: Path, header: Header) -> int:
    if "token_embd.weight" not in header.tensors:
        raise ValueError(f"{path} lacks the tensor token_embd.weight; the file is incomplete.")
    return header.tensors["token_embd.weight"].shape[0]
