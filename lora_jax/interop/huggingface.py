"""Llama models from a local Hugging Face folder of safetensors."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from lora_jax.interop.huggingface_config import config_from_huggingface
from lora_jax.interop.llama_leaves import assemble, check_tensors
from lora_jax.interop.model import Pretrained
from lora_jax.interop.packed import keep_packed, take_packed
from lora_jax.interop.placing import Place, on_device
from lora_jax.interop.read_json import read_json
from lora_jax.interop.tokenizers import check_vocabulary, tokenizer_from_huggingface
from lora_jax.models.config import LlamaConfig

_FLOATS = ("F64", "F32", "F16", "BF16")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SUFFIX = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CONVERT_PICKLES = (
    "Where you trust it, convert it to safetensors: "
    "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new), and the tokenizer likewise."
)


def load_huggingface(
    folder: str | os.PathLike, *, dtype: DTypeLike = jnp.float32, place: Place = on_device
) -> Pretrained:
    """Loads a Llama from a folder that holds config.json, safetensors and tokenizer.json.

    One file or many shards with an index; any float type, read tensor by tensor as `dtype`.
    `place(path, leaf)` makes each leaf of the tree from what lies in the file. What bitsandbytes
    packed into 4 bits becomes `NF4` or `FP4` weights with its bits, on the default device: `place`
    sees the other leaves.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: another architecture or an unsupported option; a corrupt shard; tensors missing,
        unexpected or of the wrong shape.
    """
    folder = Path(folder)
    config = config_from_huggingface(folder)
    tokenizer = tokenizer_from_huggingface(folder)
    check_vocabulary(tokenizer, config.vocab_size, str(folder))
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        _drop_redundant(tensors, config)
        packed = take_packed(tensors, str(folder))
        slices = {name: file.get_slice(name) for name, file in tensors.items()}
        shapes = {name: tuple(piece.get_shape()) for name, piece in slices.items()}
        shapes |= {name: weight.shape for name, weight in packed.items()}
        check_tensors(config, "huggingface", shapes, str(folder))
        for name, piece in slices.items():
            if piece.get_dtype() not in _FLOATS:
                raise ValueError(
                    f"{folder}: the tensor {name!r} is {piece.get_dtype()}, expected one of "
                    f"{', '.join(_FLOATS)}; load the unquantised model, quantise it here."
                )
        read = (slices | packed).__getitem__
        params = assemble(config, "huggingface", read, dtype, keep_packed(place, dtype))
    return Pretrained(
        params=params,
        config=config,
        tokenizer=tokenizer,
        name=folder.resolve().name,
        source=str(folder),
    )


def _open_tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, safe_open]:
    """Every tensor's name and the open shard that holds it."""
    if (folder / _INDEX).is_file():
        index = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise ValueError(f"{folder / _INDEX} has no weight_map; download it again.")
    elif (folder / _SINGLE).is_file():
        index = None
    elif pickles := sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES):
        raise ValueError(
            f"{folder} holds its weights as pickles ({', '.join(pickles[:3])}), which run what "
            f"their writer wants when they are read, so they are refused. {CONVERT_PICKLES}"
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


def _drop_redundant(tensors: dict[str, safe_open], config: LlamaConfig) -> None:
    """Forgets what some savers write beside the weights and what follows from the config."""
    for name in list(tensors):
        if name.endswith("rotary_emb.inv_freq") or (
            name == "lm_head.weight" and config.tie_embeddings
        ):
            del tensors[name]
