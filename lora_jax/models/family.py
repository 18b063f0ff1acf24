"""A family of decoders as a value. It holds all that differs between families; nothing else names
one.

Dimensions: B batch, T positions, D hidden, V vocabulary, N query heads, K key/value heads, H head.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lora_jax.models.config_json import ModelType
from lora_jax.models.mixed_dtypes import read_out
from lora_jax.weights import embed

Params = dict[str, Any]

_COLUMNS = PartitionSpec(None, ("tensor", "fsdp"))
# Megatron's split over `tensor` (Shoeybi et al. 2019, arXiv:1909.08053, section 3): heads and
# hidden units are divided, so that a block sums over devices once. `fsdp` splits output axes, so
# that it never cuts through the blocks of a quantised column.
SHARDING: Mapping[str, PartitionSpec] = {
    "(q|k|v|qkv|gate|up|gate_up)_proj": _COLUMNS,
    "(o|down)_proj": PartitionSpec("tensor", "fsdp"),
    "(q|k|v|gate|up)_bias": PartitionSpec("tensor"),
    "(o|down)_bias": PartitionSpec(),
    "embed": PartitionSpec("tensor", "fsdp"),
    "lm_head": _COLUMNS,
    ".*norm": PartitionSpec(),
}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One leaf of a params tree.

    Attributes:
      path: in the tree; leaves under `layers` are stacked over them.
      shape: in a checkpoint, of one layer: `(out, in)`, which the tree has transposed, since the
        model applies weights from the right; a vector; or the embedding's `(V, D)`, not transposed.
      huggingface: the tensor's name in Hugging Face's files, `{}` for the layer's index.
      gguf: the name in a GGUF file; None where llama.cpp does not have the family.
      gguf_added: what the file's values have more than the leaf's.
      initial: the initial value of a vector. A matrix is normal, of deviation `1 / sqrt(d_in)`.
    """

    path: str
    shape: tuple[int, ...]
    huggingface: str
    gguf: str | None = None
    initial: float = 1.0
    gguf_added: float = 0.0

    @property
    def is_stacked(self) -> bool:
        return self.path.startswith("layers/")

    @property
    def is_transposed(self) -> bool:
        return len(self.shape) == 2 and self.path != "embed"

    def shape_in_tree(self, num_layers: int) -> tuple[int, ...]:
        shape = self.shape[::-1] if self.is_transposed else self.shape
        return (num_layers, *shape) if self.is_stacked else shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUF:
    """How a family is stored in llama.cpp's GGUF.

    Attributes:
      architectures: its values of `general.architecture`.
      architecture_of: `(config) -> ` one of them.
      read: `(architecture, fields of a DecoderConfig, metadata, names of tensors) -> config`, with
        the metadata of the architecture, without its name in front.
      metadata: `(config) -> ` those that are written beside the ones of every decoder, or in their
        place.
      reads: the keys of metadata that `read` reads, beside those of every decoder.
      interleaved: the architectures whose RoPE rotates neighbours, (pair, half), where ours rotates
        halves, (half, pair): rows of their queries and keys are stored in that order.
    """

    architectures: tuple[str, ...]
    architecture_of: Callable[[Any], str]
    read: Callable[[str, dict[str, Any], Mapping[str, Any], Collection[str]], Any]
    metadata: Callable[[Any], dict[str, int | float]]
    reads: frozenset[str] = frozenset()
    interleaved: frozenset[str] = frozenset()


def plain_embed(tokens_BT: jax.Array, table: Any, config: Any) -> jax.Array:
    """`table[tokens]`, `[B, T, D]`."""
    del config
    return embed(tokens_BT, table)


def plain_read_out(x_BTD: jax.Array, head: Any, config: Any) -> jax.Array:
    """`x @ head`, logits `[B, T, V]` in the wider dtype of the two."""
    del config
    return read_out(x_BTD, head)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The functions and tables of a family; `config` is its own config throughout.

    Attributes:
      parameters: `(config) -> leaves`, in the tree's order.
      project: `(x [B, T, D], one layer's weights, config) -> (q [B, T, N, H], k [B, T, K, H],
        v [B, T, K, H])`: a layer up to RoPE, which the config's `ropes` declare.
      finish: `(x, attended [B, T, N, H], one layer's weights, config) -> x`: the rest of a layer.
      norm: `(x, scale, config) -> x`, of the last layer's result.
      embed: `(tokens, table, config) -> x`.
      read_out: `(x, head, config) -> logits`.
      model_types: `{model_type: ModelType}` of the config.json that it is read from.
      config_json: `(config) -> values` of the config.json that it is written as.
      gguf: None where GGUF files of it are neither read nor written.
      shapes: models that people name, for plans and for random weights.
      sharding: sharding specs by rules over paths.
    """

    parameters: Callable[[Any], tuple[Parameter, ...]]
    project: Callable[[jax.Array, Params, Any], tuple[jax.Array, jax.Array, jax.Array]]
    finish: Callable[[jax.Array, jax.Array, Params, Any], jax.Array]
    norm: Callable[[jax.Array, jax.Array, Any], jax.Array]
    embed: Callable[[jax.Array, Any, Any], jax.Array] = plain_embed
    read_out: Callable[[jax.Array, Any, Any], jax.Array] = plain_read_out
    model_types: Mapping[str, ModelType]
    config_json: Callable[[Any], dict[str, Any]]
    gguf: GGUF | None = None
    shapes: Mapping[str, Any]
    sharding: Mapping[str, PartitionSpec] = dataclasses.field(default_factory=lambda: SHARDING)
