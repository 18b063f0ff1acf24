"""Llama models from GGUF files, dequantised."""

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax.interop.gguf_config import ROPE_FACTORS, config_from_gguf
from lora_jax.interop.gguf_header import read_header
from lora_jax.interop.gguf_tensors import read_tensor
from lora_jax.interop.llama_leaves import assemble, check_tensors, family_of
from lora_jax.interop.model import Pretrained
from lora_jax.interop.tokenizers import check_vocabulary, tokenizer_from_gguf


def load_gguf(path: str | os.PathLike, *, dtype: DTypeLike = jnp.float32) -> Pretrained:
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
    shapes = {name: info.shape for name, info in header.tensors.items() if name != ROPE_FACTORS}
    check_tensors(config, "gguf", shapes, str(path))
    tokenizer = tokenizer_from_gguf(path, header.metadata)
    check_vocabulary(tokenizer, config.vocab_size, str(path))

    def read(name: str) -> np.ndarray:
        tensor = read_tensor(path, name, header.tensors[name])
        if family_of(config) != "llama":  # llama.cpp turns halves in those, as we do
            return tensor
        if name.endswith("attn_q.weight"):
            return _unpermute(tensor, config.num_heads)
        if name.endswith("attn_k.weight"):
            return _unpermute(tensor, config.num_kv_heads)
        return tensor

    return Pretrained(
        params=assemble(config, "gguf", read, dtype),
        config=config,
        tokenizer=tokenizer,
        name=path.stem,
        source=str(path),
    )


def _unpermute(tensor: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a head from (pair, half) to (half, pair) order."""
    rows, columns = tensor.shape
    pairs = tensor.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
