"""The tensors of a Hugging Face folder, under the names of the model with its head."""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from lora_jax.interop.read_json import read_json

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SUFFIX = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CONVERT_PICKLES = (
    "Where you trust it, convert it to safetensors: "
    "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new), and the tokenizer likewise."
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_BARE = ("embed_tokens.", "layers.", "norm.")  # as the inner model saves itself
_ROWS = 4096  # of two tables, compared at a time


@dataclasses.dataclass(frozen=True)
class Renamed:
    """An open shard whose tensors have other names."""

    file: Any
    names: Mapping[str, str]

    def get_slice(self, name: str) -> Any:
        return self.file.get_slice(self.names[name])

    def get_tensor(self, name: str) -> np.ndarray:
        return self.file.get_tensor(self.names[name])


def open_tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Every tensor's name and the open shard that holds it; `model.` is added where it is missing.

    Raises:
      FileNotFoundError: the weights, or a shard of them, are missing.
      ValueError: a shard is corrupt; the index is not that of the shards; a name appears twice.
    """
    tensors: dict[str, Any] = {}
    for name, file in _stored_tensors(folder, stack).items():
        full = f"model.{name}" if name.startswith(_BARE) else name
        if full in tensors:
            raise ValueError(
                f"{folder} holds {full!r} twice, with and without its prefix; save it again."
            )
        tensors[full] = file if full == name else Renamed(file, {full: name})
    return tensors


def has_head_of_its_own(tensors: dict[str, Any]) -> bool:
    """Whether the output head of a model that its config calls tied holds other values than the
    embedding; drops it otherwise. Where one of the two is missing, the other is both.

    As in transformers 5. A head that bitsandbytes packed into 4 bits is one of its own.
    """
    if HEAD not in tensors:
        return False
    if EMBEDDING not in tensors:
        tensors[EMBEDDING] = Renamed(tensors.pop(HEAD), {EMBEDDING: HEAD})
        return False
    if not _equal(tensors[HEAD].get_slice(HEAD), tensors[EMBEDDING].get_slice(EMBEDDING)):
        return True
    del tensors[HEAD]
    return False


def _equal(here: Any, there: Any) -> bool:
    if here.get_shape() != there.get_shape() or len(here.get_shape()) != 2:
        return False
    if "U8" in (here.get_dtype(), there.get_dtype()):
        return False
    rows = here.get_shape()[0]
    for at in range(0, rows, _ROWS):
        part = slice(at, min(at + _ROWS, rows))
        if not np.array_equal(np.asarray(here[part], "f4"), np.asarray(there[part], "f4")):
            return False
    return True


def _stored_tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, safe_open]:
    """Every tensor under its name in the files, and the open shard that holds it."""
    if (folder / _INDEX).is_file():
        index = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise ValueError(f"{folder / _INDEX} has no weight_map; download it again.")
    elif (folder / _SINGLE).is_file():
        index = None
    elif pickles := sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES):
        raise ValueError(
            f"{folder} holds its weights as pickles ({', '.join(pickles[:3])}), which can run "
            f"any code when they are read, so they are refused. {CONVERT_PICKLES}"
        )
    else:
        raise FileNotFoundError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}; download the weights too."
        )
    names = [_SINGLE] if index is None else _shard_names(folder, index)
    shards = {name: stack.enter_context(_open_shard(folder, name)) for name in names}
    if index is None:
        return dict.fromkeys(shards[_SINGLE].keys(), shards[_SINGLE])
    held = {shard: set(file.keys()) for shard, file in shards.items()}
    for name, shard in index.items():
        if name not in held[shard]:
            raise ValueError(
                f"{folder / _INDEX} puts {name!r} into {shard}, which does not hold it; the files "
                "are of different downloads, fetch them again."
            )
    return {name: shards[shard] for name, shard in index.items()}


def _shard_names(folder: Path, index: Mapping[str, Any]) -> list[str]:
    for shard in index.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(_SUFFIX):
            raise ValueError(
                f"{folder / _INDEX} names the shard {shard!r}, expected a {_SUFFIX} file in the "
                "folder itself."
            )
    return list(dict.fromkeys(index.values()))


def _open_shard(folder: Path, shard: str) -> safe_open:
    path = folder / shard
    if not path.is_file():
        raise FileNotFoundError(f"{folder} lacks the shard {shard}; finish the download.")
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}); fetch it again.") from None
