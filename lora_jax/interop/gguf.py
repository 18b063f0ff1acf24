"""Llama models from GGUF files, dequantised."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from gguf.quants import dequantize
from jax.typing import DTypeLike

from lora_jax.interop.gguf_header import Header, TensorInfo, read_header
from lora_jax.interop.llama_leaves import Finish, as_it_is, assemble, check_tensors
from lora_jax.interop.model import Pretrained
from lora_jax.interop.tokenizers import tokenizer_from_gguf
from lora_jax.models.config import LlamaConfig, RopeScaling

_ROPE_FACTORS = "rope_freqs.weight"


def load_gguf(
    path: str | os.PathLike, *, dtype: DTypeLike = jnp.float32, finish: Finish = as_it_is
) -> Pretrained:
    """Loads a Llama from a GGUF file of any ggml type, one tensor at a time, as `dtype`.

    Query and key rows come back from llama.cpp's interleaved rotary order to the rotate-half
    order of our model (and of Hugging Face's).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated or corrupt, holds another architecture, or lacks tensors.
    """
    path = Path(path)
    header = read_header(path)
    config = config_from_gguf(path, header)
    shapes = {name: info.shape for name, info in header.tensors.items() if name != _ROPE_FACTORS}
    check_tensors(config, "gguf", shapes, str(path))

    def read(name: str) -> np.ndarray:
        tensor = _read_tensor(path, name, header.tensors[name])
        if name.endswith("attn_q.weight"):
            return _unpermute(tensor, config.num_heads)
        if name.endswith("attn_k.weight"):
            return _unpermute(tensor, config.num_kv_heads)
        return tensor

    return Pretrained(
        params=assemble(config, "gguf", read, dtype, finish),
        config=config,
        tokenizer=tokenizer_from_gguf(path, header.metadata),
        name=path.stem,
        source=str(path),
    )


def config_from_gguf(path: Path, header: Header) -> LlamaConfig:
    """The model's shape, from a GGUF's metadata and its tensor table."""
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{path} holds the architecture {architecture!r}; supported: 'llama' "
            "(Llama 2, Llama 3.x, SmolLM2)."
        )

    def count(key: str, default: int | None = None) -> int:
        return _positive(path, metadata, key, default, int)

    hidden_size, num_heads = count("embedding_length"), count("attention.head_count")
    head_dim = count("attention.key_length", hidden_size // num_heads)
    rope_theta = _positive(path, metadata, "rope.freq_base", 10_000.0, float)
    context = count("rope.scaling.original_context_length", 8192)
    _check_rope(path, metadata, head_dim)
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
        "rope_scaling": _rope_scaling(path, header, rope_theta, head_dim, context),
        "norm_eps": _positive(path, metadata, "attention.layer_norm_rms_epsilon", None, float),
        "tie_embeddings": "output.weight" not in header.tensors,
    }
    try:
        return LlamaConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _positive(
    path: Path, metadata: Mapping[str, Any], key: str, default: Any, kind: type[int] | type[float]
) -> Any:
    value = metadata.get(f"llama.{key}", default)
    if type(value) is not kind or not 0 < value < math.inf:
        raise ValueError(f"{path}: llama.{key} is {value!r}, expected a positive {kind.__name__}.")
    # Metadata is float32: 9.999999747378752e-06 was written as 1e-05.
    return float(str(np.float32(value))) if kind is float else value


def _vocab_size(path: Path, header: Header) -> int:
    if "token_embd.weight" not in header.tensors:
        raise ValueError(f"{path} lacks the tensor token_embd.weight; the file is incomplete.")
    return header.tensors["token_embd.weight"].shape[0]


def _check_rope(path: Path, metadata: Mapping[str, Any], head_dim: int) -> None:
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind != "none":
        raise ValueError(
            f"{path}: RoPE scaling {kind!r} is not supported; supported: none, and Llama 3.1's "
            f"(the tensor {_ROPE_FACTORS})."
        )
    rotated = metadata.get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ValueError(
            f"{path}: RoPE turns {rotated} of {head_dim} dimensions of a head; supported: all."
        )


def _rope_scaling(
    path: Path, header: Header, theta: float, head_dim: int, context: int
) -> RopeScaling | None:
    """Llama 3.1's stretch is stored as its effect, one divisor a frequency; recover the cause.

    All released models share the low and high factors, so the largest divisor and the original
    context say it all; that the stored divisors follow from them is checked.
    """
    if _ROPE_FACTORS not in header.tensors:
        return None
    stored = _read_tensor(path, _ROPE_FACTORS, header.tensors[_ROPE_FACTORS])
    scaling = RopeScaling(factor=float(stored.max()), original_context=context)
    is_followed = stored.shape == (head_dim // 2,) and np.allclose(
        stored, _rope_divisors(scaling, theta, head_dim), rtol=1e-4
    )
    if not is_followed:
        raise ValueError(
            f"{path}: {_ROPE_FACTORS} does not follow Llama 3.1's rule for {scaling}; "
            "load the model from its Hugging Face folder instead, whose config.json names the rule."
        )
    return scaling


def _rope_divisors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    frequencies = theta ** (-2 * np.arange(head_dim // 2) / head_dim)
    turns = scaling.original_context * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return 1.0 / ((1.0 - kept) / scaling.factor + kept)


def _read_tensor(path: Path, name: str, info: TensorInfo) -> np.ndarray:
    data = np.fromfile(path, np.uint8, count=info.num_bytes, offset=info.offset)
    # gguf walks sixteen rows at a time in Python; few long rows halve the time.
    rows = math.gcd(math.prod(info.shape[:-1]), 64)
    try:
        tensor = dequantize(data.reshape(rows, -1), info.kind).reshape(info.shape)
    except NotImplementedError:
        raise ValueError(
            f"{path}: the tensor {name!r} is of type {info.kind.name}, which the gguf package "
            "cannot dequantise; convert the model to F16, Q8_0 or Q4_K."
        ) from None
    if not np.isfinite(tensor).all():
        raise ValueError(f"{path} is corrupt: the tensor {name!r} holds NaN or infinity.")
    return tensor


def _unpermute(tensor: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a head from (pair, half) to (half, pair) order."""
    rows, columns = tensor.shape
    pairs = tensor.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
