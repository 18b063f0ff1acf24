"""The model's shape, from the metadata of a GGUF file."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.interop.gguf_header import Header
from lora_jax.interop.gguf_keys import check_keys
from lora_jax.interop.gguf_tensors import StoredTensor
from lora_jax.models.config import DecoderConfig, RopeScaling
from lora_jax.models.families import ARCHITECTURES

ROPE_FACTORS = "rope_freqs.weight"


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
    original_context = count("rope.scaling.original_context_length", 8192)
    check_keys(path, metadata, family, head_dim)
    fields = {
        "vocab_size": _vocab_size(path, header),
        "hidden_size": hidden_size,
        "intermediate_size": count("feed_forward_length"),
        "num_layers": count("block_count"),
        "num_heads": num_heads,
        "num_kv_heads": count("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "context_length": count("context_length"),
        "rope_theta": rope_theta,
        "rope_scaling": _rope_scaling(path, header, rope_theta, head_dim, original_context),
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
        return ARCHITECTURES[family].read(family, fields, own)
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


def _rope_scaling(
    path: Path, header: Header, theta: float, head_dim: int, context: int
) -> RopeScaling | None:
    """Llama 3.1's scaling, from the divisors of frequencies that GGUF stores in its place.

    All released models share the low and high factors, so the largest divisor and the original
    context determine it; that the stored divisors follow from them is checked.
    """
    if ROPE_FACTORS not in header.tensors:
        return None
    family = header.metadata["general.architecture"]
    if family not in ARCHITECTURES[family].interleaved:
        raise ValueError(f"{path} holds {ROPE_FACTORS}, which llama.cpp does not read in {family}.")
    info = header.tensors[ROPE_FACTORS]
    if info.shape != (head_dim // 2,):
        raise ValueError(f"{path}: {ROPE_FACTORS} is {info.shape}, expected ({head_dim // 2},).")
    stored = StoredTensor(path=path, name=ROPE_FACTORS, info=info)[:,]
    scaling = RopeScaling(factor=float(stored.max()), original_context=context)
    if not np.allclose(stored, rope_divisors(scaling, theta, head_dim), rtol=1e-4):
        raise ValueError(
            f"{path}: {ROPE_FACTORS} does not follow Llama 3.1's rule for {scaling}; "
            "load the model from its Hugging Face folder instead, whose config.json names the rule."
        )
    return scaling


def rope_divisors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    frequencies = theta ** (-2 * np.arange(head_dim // 2) / head_dim)
    turns = scaling.original_context * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return 1.0 / ((1.0 - kept) / scaling.factor + kept)
