"""A model as a GGUF file, which llama.cpp and its kin load."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import GGUFWriter
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    LlamaFileType,
)
from gguf.quants import quantize

from lora_jax.interop.digest import KEY, Digest
from lora_jax.interop.gguf_rope import scaling_to_gguf
from lora_jax.interop.gguf_tensors import added_values, permuted_rows
from lora_jax.interop.gguf_tokenizer import tokenizer_to_gguf
from lora_jax.interop.model import Pretrained
from lora_jax.interop.model_tensors import FileTensor, disassemble
from lora_jax.interop.progress import byte_progress
from lora_jax.interop.writing import appearing, cast
from lora_jax.models.config import DecoderConfig

Kind = Literal["F16", "Q8_0"]
_FILE_TYPES = {"F16": LlamaFileType.MOSTLY_F16, "Q8_0": LlamaFileType.MOSTLY_Q8_0}


def save_gguf(
    path: str | os.PathLike,
    model: Pretrained,
    *,
    kind: Kind = "F16",
    digest: Digest | None = None,
) -> None:
    """Writes `model` as a GGUF file with its tokenizer and chat template inside.

    Matrices are written as `kind`, but as F16 where rows do not fill blocks of Q8_0; vectors as
    F32. Names, and the order of query and key rows, are llama.cpp's. The file appears
    only when it is complete; the host holds one tensor at a time.

    Args:
      path: must not exist.
      model: its params plain arrays; `dataclasses.replace(model, params=merge(base, delta))`
        exports a merged adapter.
      kind: "F16", or "Q8_0": blocks of 32 signed bytes with a float16 scale each.
      digest: of a merged adapter, `digest_of(forward, base, delta)`: what the model should compute.

    Raises:
      ValueError: the file exists; params do not follow the config or are not plain; a weight
        overflows float16; GGUF cannot express the tokenizer or the RoPE scaling.
    """
    path = Path(path)
    if kind not in _FILE_TYPES:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(_FILE_TYPES)}.")
    tensors = disassemble(model.params, model.config, "gguf")
    vocabulary = tokenizer_to_gguf(model.tokenizer, model.config.vocab_size)
    gguf: Any = model.config.family.gguf  # `disassemble` has refused a family without one
    architecture = gguf.architecture_of(model.config)
    rope_keys, rope_tensors = scaling_to_gguf(model.config, architecture)
    own = rope_keys | gguf.metadata(model.config)
    with appearing(path) as temporary:
        writer = GGUFWriter(temporary, architecture)
        try:
            _add_metadata(writer, model, kind)
            for key, value in (_metadata(model.config) | own).items():
                _add(writer, f"{architecture}.{key}", value)
            _add_vocabulary(writer, vocabulary)
            if digest is not None:
                writer.add_string(KEY, digest.to_json())
            _write_tensors(writer, rope_tensors | tensors, model.config, GGMLQuantizationType[kind])
        finally:
            writer.close()


def _add_metadata(writer: GGUFWriter, model: Pretrained, kind: Kind) -> None:
    writer.add_name(model.name)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _metadata(config: DecoderConfig) -> dict[str, int | float]:
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_layers,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.rope.dims,
        "rope.freq_base": float(config.rope_theta),
    }


def _add_vocabulary(writer: GGUFWriter, metadata: Mapping[str, Any]) -> None:
    for key, value in metadata.items():
        if value or isinstance(value, bool | int | str):
            _add(writer, key, value)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _write_tensors(
    writer: GGUFWriter,
    tensors: Mapping[str, FileTensor],
    config: DecoderConfig,
    kind: GGMLQuantizationType,
) -> None:
    kinds = {name: _kind_of(tensor, kind) for name, tensor in tensors.items()}
    sizes = {}
    for name, tensor in tensors.items():
        block, block_bytes = GGML_QUANT_SIZES[kinds[name]]
        sizes[name] = tensor.size // block * block_bytes
        logical = np.dtype(np.float32)  # any but uint8, whose shape would count bytes
        writer.add_tensor_info(name, tensor.shape, logical, sizes[name], kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    permuted, added = permuted_rows(config), added_values(config)
    with byte_progress(only_on_terminal=True) as bar:
        task = bar.add_task("saving", total=sum(sizes.values()))
        for name, tensor in tensors.items():
            array = cast(name, tensor.fetch(), np.dtype(np.float32))
            if (rows := permuted.get(name.split(".")[-2])) is not None:
                array = array[np.argsort(rows)]
            if name in added:
                array = array + np.float32(added[name])
            if kinds[name] is GGMLQuantizationType.F16:
                array = cast(name, array, np.dtype(np.float16))
            elif kinds[name] is not GGMLQuantizationType.F32:
                array = quantize(array, kinds[name])
            writer.write_tensor_data(array)
            bar.advance(task, sizes[name])


def _kind_of(tensor: FileTensor, kind: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(tensor.shape) == 1:
        return GGMLQuantizationType.F32
    fills_blocks = tensor.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0
    return kind if fills_blocks else GGMLQuantizationType.F16
