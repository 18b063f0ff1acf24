"""A model as a Hugging Face folder, which transformers and its kin load."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from lora_jax.data.tokenizer import Tokenizer
from lora_jax.interop.digest import KEY, Digest
from lora_jax.interop.huggingface_config import config_from_huggingface
from lora_jax.interop.model import Pretrained
from lora_jax.interop.model_tensors import FileTensor, disassemble
from lora_jax.interop.progress import byte_progress
from lora_jax.interop.quantization_config import quantization_config
from lora_jax.interop.read_json import read_json
from lora_jax.interop.writing import appearing, cast
from lora_jax.quant import Quantized, to_bitsandbytes

_DTYPES = ("float32", "bfloat16", "float16")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Keys that name code to run or another place, or the format of the source's weights.
_LEFT_OUT = ("auto_map", "_name_or_path", "quantization_config", "dtype", "torch_dtype")


def save_huggingface(
    folder: str | os.PathLike,
    model: Pretrained,
    *,
    dtype: DTypeLike | None = None,
    shard_bytes: int = 5_000_000_000,
    digest: Digest | None = None,
) -> None:
    """Writes `model` as a folder that `AutoModelForCausalLM.from_pretrained` loads.

    To export a merged adapter, pass `dataclasses.replace(model, params=merge(base, delta))`.
    Tied weights stay tied. The tokenizer's files, the chat template and generation_config.json
    are copied from the folder that the model was loaded from, config.json too where it still has
    the model's shape; otherwise they are written from the model. The folder appears only when it
    is complete; the host holds one shard at a time.

    NF4 and FP4 weights, of one format in all of the model, are written as bitsandbytes serialises
    them, bit for bit, with the quantization_config that transformers loads them by.

    Args:
      folder: must not exist, or be empty.
      model: its params plain arrays, or quantised linears among them.
      dtype: of the plain weights: float32, bfloat16 or float16; None keeps the embedding's.
      shard_bytes: weights beyond this go into several files, with an index.
      digest: of a merged adapter, `digest_of(forward, base, delta)`: what the model should compute,
        for `check_digest`.

    Raises:
      ValueError: the folder is not empty; params do not follow the config, or are neither plain nor
        of a format of bitsandbytes; a weight overflows `dtype`.
    """
    folder, source = Path(folder), Path(model.source)
    tensors = disassemble(model.params, model.config, "huggingface")
    kept = jnp.dtype(model.params["embed"].dtype if dtype is None else dtype)
    if kept.name not in _DTYPES:
        raise ValueError(f"dtype={kept.name}: weights are saved as one of {', '.join(_DTYPES)}.")
    settings: dict[str, Any] = {"torch_dtype": kept.name}
    quantization = quantization_config(model.params, model.config, kept.name)
    if quantization is not None:
        settings["quantization_config"] = quantization
    with appearing(folder) as temporary:
        temporary.mkdir()
        metadata = {"format": "pt"} | ({KEY: digest.to_json()} if digest else {})
        _write_weights(temporary, tensors, kept, shard_bytes, metadata)
        _write_json(temporary / "config.json", _config(model, source) | settings)
        if (source / "tokenizer.json").is_file():
            for name in _TOKENIZER_FILES:
                _copy(source / name, temporary)
        else:
            _write_tokenizer(temporary, model.tokenizer)
        if not _copy(source / "generation_config.json", temporary):
            _write_json(temporary / "generation_config.json", _special_ids(model.tokenizer))


def _write_weights(
    folder: Path,
    tensors: Mapping[str, FileTensor],
    dtype: np.dtype,
    shard_bytes: int,
    metadata: dict[str, str],
) -> None:
    sizes = {name: tensor.nbytes(dtype) for name, tensor in tensors.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    weight_map: dict[str, str] = {}
    total = 0
    with byte_progress(only_on_terminal=True) as bar:
        task = bar.add_task("saving", total=sum(sizes.values()))
        for file, names in zip(files, shards, strict=True):
            held: dict[str, np.ndarray] = {}
            for name in names:
                held |= _as_stored(name, tensors[name].fetch(), dtype)
            save_file(held, folder / file, metadata=metadata)
            weight_map |= dict.fromkeys(held, file)
            total += sum(array.nbytes for array in held.values())
            bar.advance(task, sum(sizes[name] for name in names))
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _as_stored(name: str, tensor: Any, dtype: np.dtype) -> dict[str, np.ndarray]:
    if isinstance(tensor, Quantized):
        return to_bitsandbytes(tensor, name)
    return {name: cast(name, tensor, dtype)}


def _config(model: Pretrained, source: Path) -> dict[str, Any]:
    """The source's own config.json while its shape is the model's, for its other keys."""
    if (source / "config.json").is_file() and config_from_huggingface(source) == model.config:
        stated = read_json(source / "config.json")
        return {key: value for key, value in stated.items() if key not in _LEFT_OUT}
    return model.config.family.config_json(model.config) | _special_ids(model.tokenizer)


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    return {key: token_id for key, token_id in ids.items() if token_id is not None}


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    tokenizer.core.save(str(folder / "tokenizer.json"))
    tokens = {
        key.removesuffix("_id"): tokenizer.core.id_to_token(token_id)
        for key, token_id in _special_ids(tokenizer).items()
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    _write_json(folder / "tokenizer_config.json", settings)


def _copy(file: Path, folder: Path) -> bool:
    if file.is_file():
        shutil.copyfile(file, folder / file.name)
    return file.is_file()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
