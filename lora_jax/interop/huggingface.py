"""Models from a local Hugging Face folder of safetensors."""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.interop.huggingface_config import config_from_huggingface, is_in_four_bits
from lora_jax.interop.huggingface_files import has_head_of_its_own, open_tensors
from lora_jax.interop.model import Pretrained
from lora_jax.interop.model_tensors import assemble, check_tensors
from lora_jax.interop.packed import keep_packed, take_packed
from lora_jax.interop.placing import Place, on_device
from lora_jax.interop.read_json import read_json
from lora_jax.interop.tokenizers import fit_vocabulary, tokenizer_from_huggingface
from lora_jax.models.config import DecoderConfig

_FLOATS = ("F64", "F32", "F16", "BF16")


def load_huggingface(
    folder: str | os.PathLike, *, dtype: DTypeLike = jnp.float32, place: Place = on_device
) -> Pretrained:
    """Loads a model from a folder that holds config.json, safetensors and tokenizer.json.

    One file or many shards with an index; any float type, read tensor by tensor as `dtype`. A head
    that the config calls tied is the embedding only where it holds the same values, as in
    transformers 5.
    `place(path, leaf)` makes each leaf of the tree from the stored tensors. Those that bitsandbytes
    packed into 4 bits become `NF4` or `FP4` weights with the same bits, on the default device;
    `place` gets the other leaves.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: another architecture or an unsupported option; a corrupt shard; tensors missing,
        unexpected or of the wrong shape.
    """
    folder = Path(folder)
    config = config_from_huggingface(folder)
    tokenizer = tokenizer_from_huggingface(folder)
    tokenizer = fit_vocabulary(tokenizer, config.vocab_size, str(folder))
    with contextlib.ExitStack() as stack:
        tensors, config = _open_tensors(folder, config, stack)
        packed = take_packed(tensors, str(folder))
        _check_packing(folder, bool(packed))
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


def _open_tensors(
    folder: Path, config: DecoderConfig, stack: contextlib.ExitStack
) -> tuple[dict[str, Any], DecoderConfig]:
    """Every tensor and the shard that holds it, without those that follow from the config; and the
    config, untied where the head is not the embedding."""
    tensors = open_tensors(folder, stack)
    for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")]:
        del tensors[name]
    if config.tie_embeddings and has_head_of_its_own(tensors):
        config = dataclasses.replace(config, tie_embeddings=False)
    return tensors, config


def _check_packing(folder: Path, is_packed: bool) -> None:
    path = folder / "config.json"
    if is_in_four_bits(path, read_json(path)) and not is_packed:
        raise ValueError(
            f"{path} says that bitsandbytes quantised the weights, but none is in 4 bits, and "
            "other programs would quantise them as they load. Remove quantization_config for the "
            "floats that the files hold."
        )
