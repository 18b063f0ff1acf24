"""The codec of one method in PEFT's format."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.interop.peft.config import Allowed
from lora_jax.interop.peft.model import Model, Tensors
from lora_jax.methods import DeltaNode, FullNode

Nodes = Mapping[str, DeltaNode]


@dataclasses.dataclass(frozen=True)
class Contents:
    """The contents of an adapter's two files that are its method's.

    Attributes:
      config: adapter_config.json. A codec writes neither peft_type nor target_modules.
      modules: `{module: {name: tensor}}` of the modules that the method is on.
      own: `{name: tensor}` of those that belong to no module.
      metadata: of the file of tensors.
    """

    config: Mapping[str, Any]
    modules: Mapping[str, Tensors] = dataclasses.field(default_factory=dict)
    own: Tensors = dataclasses.field(default_factory=dict)
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codec:
    """All that is specific to a method; what all share, such as modules_to_save, is not here.

    Attributes:
      types: the values of peft_type that it reads; it writes the first.
      nodes: the classes of nodes that it writes.
      decode: from the contents to `{path: node}`. Raises ValueError for what the config states and
        the tensors lack, or the other way round.
      encode: from `{path: node}` to the contents. Raises ValueError for what PEFT's format lacks.
      encode_vllm: the same in vLLM's format, where vLLM serves the method.
      values: the values that fields of the config may have.
      own: the names of tensors that belong to no module.
      in_layers: whether it changes layers: then target_modules names them, and PEFT wraps the model
        once more, which the names of tensors begin with.
      own_biases: the value of `bias` that trains the biases of the method's own modules; None where
        the type does not train them.
      ties_head: whether the type has `ensure_weight_tying`.
      check_whole: Raises ValueError for leaves that cannot be trained whole beside the method.
    """

    types: tuple[str, ...]
    nodes: tuple[type[DeltaNode], ...]
    decode: Callable[[Contents, Model], dict[str, Any]]
    encode: Callable[[Any, Model], Contents]
    encode_vllm: Callable[[Any, Model], Contents] | None = None
    values: Mapping[str, Allowed] = dataclasses.field(default_factory=dict)
    own: tuple[str, ...] = ()
    in_layers: bool = True
    own_biases: str | None = None
    ties_head: bool = False
    check_whole: Callable[[Mapping[str, FullNode], Model], None] | None = None

    @property
    def prefix(self) -> str:
        """The prefix of the names of modules in the file."""
        return "base_model.model." if self.in_layers else "base_model."

    @property
    def method(self) -> str:
        """The method's name, for messages."""
        return self.nodes[0].__name__.removesuffix("Node")

    def __str__(self) -> str:
        classes = ", ".join(node.__name__ for node in self.nodes)
        return f"the codec of {', '.join(self.types)} ({classes})"
