"""The families that can be loaded, each of one file."""

from typing import Any

from lora_jax.models import gemma2, gemma3, granite, llama, olmo2, phi3, smollm3
from lora_jax.models.config_json import ModelType
from lora_jax.models.family import GGUF, Family

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    olmo2.FAMILY,
    granite.FAMILY,
    smollm3.FAMILY,
    phi3.FAMILY,
)
MODEL_TYPES: dict[str, ModelType] = {
    name: model_type for family in FAMILIES for name, model_type in family.model_types.items()
}
ARCHITECTURES: dict[str, GGUF] = {
    name: family.gguf for family in FAMILIES if family.gguf for name in family.gguf.architectures
}
SHAPES: dict[str, Any] = {
    name: shape for family in FAMILIES for name, shape in family.shapes.items()
}
