"""The README.md of an adapter."""

from typing import Any

from lora_jax.describe import describe
from lora_jax.transform import Delta
from lora_jax.version import __version__
from lora_jax.weights import PyTree


def model_card(
    params: PyTree, delta: Delta, *, base_name: str, data: str, command: str, **facts: Any
) -> str:
    """A model card, with the front matter that the Hugging Face hub reads.

    Args:
      params: the base, or its shapes.
      delta: what was trained.
      base_name: the base's hub name or folder.
      data: what it was trained on.
      command: what trained it.
      **facts: further lines, such as `validation_loss=1.11`.
    """
    table = str(describe(params, delta))
    lines = "".join(f"- {name.replace('_', ' ')}: {value}\n" for name, value in facts.items())
    return (
        f"---\nbase_model: {base_name}\nlibrary_name: peft\ntags:\n- lora\n---\n\n"
        f"# An adapter of {base_name}\n\n"
        f"- base: {base_name}\n- data: {data}\n- made with: lora_jax {__version__}\n{lines}\n"
        f"```sh\n{command}\n```\n\n"
        f"## What was trained\n\n```\n{table}\n```\n"
    )
