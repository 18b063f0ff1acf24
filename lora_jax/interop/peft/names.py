"""The names of our leaves, and of the layers of stacked leaves, in a PyTorch model."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from lora_jax import paths
from lora_jax.layouts import Layout
from lora_jax.models.config import DecoderConfig

Names = Mapping[str, str]
HEAD, TABLE = "lm_head", "embed_tokens"


@dataclasses.dataclass(frozen=True)
class Slot:
    """One module, such as `model.layers.0.self_attn.q_proj`, and the weight that it holds.

    Attributes:
      module: its name in the PyTorch model.
      path: of our leaf.
      layer: the index along the leaf's stack axis, or None for a leaf that is not stacked.
      d_in, d_out: of the matrix.
    """

    module: str
    path: str
    layer: int | None
    d_in: int
    d_out: int

    @property
    def suffix(self) -> str:
        return self.module.rpartition(".")[2]

    @property
    def is_embedding(self) -> bool:
        return self.suffix == TABLE


class ModelNames(dict[str, str]):
    """The names of one of our models, and its config, with which an export can be run."""

    def __init__(self, names: Mapping[str, str], config: DecoderConfig):
        super().__init__(names)
        self.config = config


def model_names(config: DecoderConfig) -> ModelNames:
    """`{path: module}` for one of our models, with `{}` for the index of a stacked layer; a bias
    is named as a tensor, `model.layers.{}.self_attn.q_proj.bias`."""
    names = {
        leaf.path: leaf.huggingface.removesuffix(".weight")
        for leaf in config.family.parameters(config)
    }
    return ModelNames(names, config)


def slots_of(
    leaves: Mapping[str, Any], names: Names, layouts: Mapping[str, Layout | None]
) -> dict[str, Slot]:
    """Every matrix of the model as `{module: Slot}`.

    Raises:
      ValueError: for a name without a leaf, or a template whose `{}` does not fit the leaf.
    """
    slots = {}
    for path, template in names.items():
        if path not in leaves:
            raise ValueError(
                f"names has {path!r}, which the params lack; the nearest paths are: "
                f"{', '.join(paths.nearest(path, leaves))}."
            )
        shape, stacked = leaves[path].shape, "{}" in template
        layout = layouts.get(path) or Layout()
        if len(shape) < (3 if stacked else 2):
            continue  # a norm's scale or a bias
        stack, d_in, d_out = (tuple(dims) for dims in layout.split(shape))
        if len(stack) != stacked:
            raise ValueError(
                f"{path}, of shape {tuple(shape)}, has {len(stack)} stack axes, but its name "
                f"{template!r} has {int(stacked)} place(s) for an index. Give its layout, or mend "
                "its name."
            )
        for layer in range(stack[0]) if stacked else [None]:
            module = template.format(layer)
            slots[module] = Slot(module, path, layer, math.prod(d_in), math.prod(d_out))
    return slots


def parents(name: str) -> Iterator[str]:
    """Of `a.b.c`, `a.b` and `a`: the modules that hold a tensor or a module."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
