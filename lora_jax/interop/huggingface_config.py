"""The model's shape, from a Hugging Face config.json."""

from pathlib import Path
from typing import Any

from lora_jax.interop.read_json import read_json
from lora_jax.models.config import DecoderConfig
from lora_jax.models.config_json import stated_values
from lora_jax.models.families import MODEL_TYPES

_IN_FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def config_from_huggingface(folder: Path) -> DecoderConfig:
    """The model's shape, from config.json; raises for options that are unsupported or unknown.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: another model type, an unsupported or unknown option, or a value of the wrong
        type.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json; expected a Hugging Face model folder (config.json, "
            "*.safetensors, tokenizer.json)."
        )
    values = read_json(path)
    name = values.get("model_type")
    if not isinstance(name, str) or name not in MODEL_TYPES:
        raise ValueError(
            f"{path}: unsupported model_type={name!r}; supported: "
            f"{', '.join(map(repr, MODEL_TYPES))}. A model of your own goes through adapt(fn)."
        )
    model_type = MODEL_TYPES[name]
    stated = stated_values(path, values, model_type)
    is_in_four_bits(path, values)
    try:
        return model_type.read(stated)
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from None


def is_in_four_bits(path: Path, values: dict[str, Any]) -> bool:
    """Whether a config.json says that bitsandbytes quantised the weights.

    Raises:
      ValueError: they are quantised in another way.
    """
    quantization = values.get("quantization_config")
    if quantization is None:
        return False
    if not isinstance(quantization, dict) or not _IN_FOUR_BITS.items() <= quantization.items():
        raise ValueError(
            f"{path}: unsupported quantization_config={quantization!r} (supported: "
            f"{_IN_FOUR_BITS!r}, and none). Load the unquantised model, and quantise it here."
        )
    return True
