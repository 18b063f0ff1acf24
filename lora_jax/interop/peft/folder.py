"""Reads and writes the two files of an adapter's folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lora_jax.interop.peft.model import Tensors
from lora_jax.interop.read_json import read_json

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG}; expected a folder that PEFT's save_pretrained wrote."
        )
    return dict(read_json(path))


def read_tensors(folder: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors, and the file's metadata."""
    path = folder / TENSORS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {TENSORS}. Pickles (.bin) are not read: load the adapter in PEFT "
            "and save it again, save_pretrained(..., safe_serialization=True)."
        )
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            for name in names:
                if (dtype := file.get_slice(name).get_dtype()) not in _FLOATS:
                    raise ValueError(
                        f"{path}: the tensor {name!r} is {dtype}, expected one of "
                        f"{', '.join(_FLOATS)}."
                    )
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}); fetch it again.") from None


def refuse_adapter(folder: Path) -> None:
    """Raises FileExistsError where the folder holds an adapter."""
    if (folder / CONFIG).exists() or (folder / TENSORS).exists():
        raise FileExistsError(f"{folder} holds an adapter already: choose another folder.")


def write(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    metadata: Mapping[str, str],
    card: str | None,
) -> None:
    """Writes the config last: a folder that has one is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt", **metadata})
    if card is not None:
        (folder / "README.md").write_text(card)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
