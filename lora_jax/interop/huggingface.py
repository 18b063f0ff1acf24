"""Llama models from a local Hugging Face folder of safetensors."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from lora_jax.interop.llama_leaves import Finish, as_it_is, assemble, check_tensors
from lora_jax.interop.model import Pretrained
from lora_jax.interop.tokenizers import read_json, tokenizer_from_huggingface
from lora_jax.models.config import LlamaConfig, RopeScaling

_FLOATS = ("F64", "F32", "F16", "BF16")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SUFFIX = ".safetensors"


def load_huggingface(
    folder: str | os.PathLike, *, dtype: DTypeLike = jnp.float32, finish: Finish = as_it_is
) -> Pretrained:
    """Loads a Llama from a folder that holds config.json, safetensors and tokenizer.json.

    One file or many shards with an index; any float type, read tensor by tensor as `dtype`.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: another architecture or an unsupported option; a corrupt shard; tensors missing,
        unexpected or of the wrong shape.
    """
    folder = Path(folder)
    config = config_from_huggingface(folder)
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        _drop_redundant(tensors, config)
        slices = {name: file.get_slice(name) for name, file in tensors.items()}
        shapes = {name: tuple(piece.get_shape()) for name, piece in slices.items()}
        check_tensors(config, "huggingface", shapes, str(folder))
        for name, piece in slices.items():
            if piece.get_dtype() not in _FLOATS:
                raise ValueError(
                    f"{folder}: the tensor {name!r} is {piece.get_dtype()}, expected one of "
                    f"{', '.join(_FLOATS)}; load the unquantised model, quantise it here."
                )
        params = assemble(
            config, "huggingface", lambda name: tensors[name].get_tensor(name), dtype, finish
        )
    return Pretrained(
        params=params,
        config=config,
        tokenizer=tokenizer_from_huggingface(folder),
        name=folder.resolve().name,
        source=str(folder),
    )


def config_from_huggingface(folder: Path) -> LlamaConfig:
    """The model's shape, from config.json; refuses options that our Llama has not."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json; expected a Hugging Face model folder (config.json, "
            "*.safetensors, tokenizer.json)."
        )
    values = read_json(path)
    _refuse_other_models(path, values)

    def number(key: str, default: float | None = None) -> float:
        value = default if values.get(key) is None else values[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{path}: {key} is {value!r}, expected a positive number.")
        return value

    hidden_size, num_heads = int(number("hidden_size")), int(number("num_attention_heads"))
    rope_theta, rope_scaling = _rope(path, values)
    return LlamaConfig(
        vocab_size=int(number("vocab_size")),
        hidden_size=hidden_size,
        intermediate_size=int(number("intermediate_size")),
        num_layers=int(number("num_hidden_layers")),
        num_heads=num_heads,
        num_kv_heads=int(number("num_key_value_heads", num_heads)),
        head_dim=int(number("head_dim", hidden_size // num_heads)),
        context_length=int(number("max_position_embeddings", 2048)),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_eps=number("rms_norm_eps", 1e-6),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
    )


def _refuse_other_models(path: Path, values: Mapping[str, Any]) -> None:
    required = {
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "quantization_config": None,
        "pretraining_tp": 1,
    }
    found = {"model_type": values.get("model_type")}
    found |= {key: values.get(key, required[key]) for key in required if key != "model_type"}
    wrong = [
        f"{key}={value!r} (supported: {required[key]!r})"
        for key, value in found.items()
        if value != required[key]
    ]
    if wrong:
        raise ValueError(
            f"{path}: unsupported {', '.join(wrong)}. Llama 2, Llama 3.x and SmolLM2 checkpoints "
            "in plain floats can be loaded."
        )


def _rope(path: Path, values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling; transformers 5 keeps both in rope_parameters, before it they lay apart."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or values.get("rope_theta") or 10_000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(
            f"{path}: RoPE scaling {kind!r} is not supported; supported: 'default' and 'llama3'."
        )
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [name for name in names if name not in rope]:
        raise ValueError(f"{path}: the RoPE scaling 'llama3' lacks {', '.join(missing)}.")
    factor, low, high, original = (rope[name] for name in names)
    return theta, RopeScaling(
        factor=float(factor),
        low_freq_factor=float(low),
        high_freq_factor=float(high),
        original_context=int(original),
    )


def _open_tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, safe_open]:
    """Every tensor's name and the open shard that holds it."""
    if (folder / _INDEX).is_file():
        index = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise ValueError(f"{folder / _INDEX} has no weight_map; download it again.")
    elif (folder / _SINGLE).is_file():
        index = None
    else:
        raise FileNotFoundError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}. If its weights are .bin or .pth files, "
            "convert them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
        )
    shards = {
        shard: stack.enter_context(_open_shard(folder, shard))
        for shard in ([_SINGLE] if index is None else dict.fromkeys(index.values()))
    }
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


def _open_shard(folder: Path, shard: object) -> safe_open:
    if not isinstance(shard, str) or Path(shard).name != shard or Path(shard).suffix != _SUFFIX:
        raise ValueError(
            f"{folder / _INDEX} names the shard {shard!r}, expected a .safetensors file in the "
            "folder itself."
        )
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
