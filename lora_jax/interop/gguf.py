"""Models from GGUF files, dequantised."""

import os
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.interop.gguf_config import config_from_gguf
from lora_jax.interop.gguf_header import read_header
from lora_jax.interop.gguf_rope import ROPE_TENSORS
from lora_jax.interop.gguf_tensors import StoredTensor, added_values, permuted_rows
from lora_jax.interop.gguf_tokenizer import tokenizer_from_gguf
from lora_jax.interop.model import Pretrained
from lora_jax.interop.model_tensors import assemble, check_tensors
from lora_jax.interop.placing import Place, on_device
from lora_jax.interop.tokenizers import fit_vocabulary


def load_gguf(
    path: str | os.PathLike, *, dtype: DTypeLike = jnp.float32, place: Place = on_device
) -> Pretrained:
    """Loads a model from a GGUF file of any ggml type, one tensor at a time, as `dtype`.

    `place(path, leaf)` makes each leaf of the tree from the stored tensors.

    Query and key rows are permuted from llama.cpp's interleaved rotary order to the rotate-half
    order of our models (and of Hugging Face's).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated or corrupt, holds another architecture, or lacks tensors.
    """
    path = Path(path)
    header = read_header(path)
    config = config_from_gguf(path, header)
    shapes = {name: info.shape for name, info in header.tensors.items() if name not in ROPE_TENSORS}
    check_tensors(config, "gguf", shapes, str(path))
    tokenizer = tokenizer_from_gguf(path, header.metadata)
    tokenizer = fit_vocabulary(tokenizer, config.vocab_size, str(path))

    permuted, added = permuted_rows(config), added_values(config)

    def read(name: str) -> StoredTensor:
        rows = permuted.get(name.split(".")[-2])
        return StoredTensor(
            path=path,
            name=name,
            info=header.tensors[name],
            rows=rows,
            added=added.get(name, 0.0),
        )

    return Pretrained(
        params=assemble(config, "gguf", read, dtype, place),
        config=config,
        tokenizer=tokenizer,
        name=path.stem,
        source=str(path),
    )
