"""The Llama params tree, leaf by leaf, under the names that checkpoints give its tensors."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax.models.config import LlamaConfig

Naming = Literal["gguf", "huggingface"]
Finish = Callable[[str, np.ndarray], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One leaf of the tree. `{}` in a name is a layer's index; `shape` is a file's (out, in)."""

    path: tuple[str, ...]
    gguf: str
    huggingface: str
    shape: tuple[int, ...]

    def names(self, naming: Naming, num_layers: int) -> list[str]:
        template = getattr(self, naming)
        return [template.format(i) for i in range(num_layers)] if "{}" in template else [template]


def llama_leaves(config: LlamaConfig) -> list[Leaf]:
    """The leaves of a model of this shape, in the tree's order."""
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    q, k = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rows = [
        ("embed", "token_embd", "model.embed_tokens", (v, d)),
        ("layers/attn_norm", "blk.{}.attn_norm", "model.layers.{}.input_layernorm", (d,)),
        ("layers/attn/q_proj", "blk.{}.attn_q", "model.layers.{}.self_attn.q_proj", (q, d)),
        ("layers/attn/k_proj", "blk.{}.attn_k", "model.layers.{}.self_attn.k_proj", (k, d)),
        ("layers/attn/v_proj", "blk.{}.attn_v", "model.layers.{}.self_attn.v_proj", (k, d)),
        ("layers/attn/o_proj", "blk.{}.attn_output", "model.layers.{}.self_attn.o_proj", (d, q)),
        ("layers/mlp_norm", "blk.{}.ffn_norm", "model.layers.{}.post_attention_layernorm", (d,)),
        ("layers/mlp/gate_proj", "blk.{}.ffn_gate", "model.layers.{}.mlp.gate_proj", (f, d)),
        ("layers/mlp/up_proj", "blk.{}.ffn_up", "model.layers.{}.mlp.up_proj", (f, d)),
        ("layers/mlp/down_proj", "blk.{}.ffn_down", "model.layers.{}.mlp.down_proj", (d, f)),
        ("norm", "output_norm", "model.norm", (d,)),
    ]
    if not config.tie_embeddings:
        rows.append(("lm_head", "output", "lm_head", (v, d)))
    return [
        Leaf(
            path=tuple(path.split("/")),
            gguf=gguf + ".weight",
            huggingface=huggingface + ".weight",
            shape=shape,
        )
        for path, gguf, huggingface, shape in rows
    ]


def check_tensors(
    config: LlamaConfig, naming: Naming, found: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Raises ValueError unless `found` (name to shape) is exactly the model's set of tensors."""
    if config.num_layers > len(found):  # else a flipped bit makes the names below fill the memory
        raise ValueError(
            f"{source} claims {config.num_layers} layers but holds {len(found)} tensors; the file "
            "is incomplete or corrupt."
        )
    expected = {
        name: leaf.shape
        for leaf in llama_leaves(config)
        for name in leaf.names(naming, config.num_layers)
    }
    if missing := expected.keys() - found.keys():
        raise ValueError(
            f"{source} lacks {_listed(missing)}, which a Llama of {config.num_layers} layers "
            "needs; the file is incomplete, or its config is another model's."
        )
    if unexpected := found.keys() - expected.keys():
        raise ValueError(
            f"{source} holds {_listed(unexpected)}, which our Llama has no place for; only "
            "Llama 2, Llama 3.x and SmolLM2 without biases or experts are supported."
        )
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise ValueError(
                f"{source}: the tensor {name!r} has shape {tuple(found[name])}, but the config "
                f"asks for {shape}; the weights and the config belong to different models."
            )


def as_it_is(path: str, leaf: np.ndarray) -> jax.Array:
    """The `finish` that changes nothing."""
    del path
    return jnp.asarray(leaf)


def assemble(
    config: LlamaConfig,
    naming: Naming,
    read: Callable[[str], np.ndarray],
    dtype: DTypeLike,
    finish: Finish = as_it_is,
) -> dict:
    """Builds the params tree leaf by leaf; the host holds a stacked leaf or two beside the result.

    `read(name)` returns the named tensor as the file orders it, (out, in). Leaves other than the
    embedding come out transposed, since the model applies weights from the right. The tree holds
    what `finish(path, leaf)` makes of each.
    """
    params: dict = {}
    for leaf in llama_leaves(config):
        node = params
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        names = leaf.names(naming, config.num_layers)
        loaded = _load_leaf(leaf, map(read, names), len(names), dtype)
        node[leaf.path[-1]] = finish("/".join(leaf.path), loaded)
        del loaded  # before the next is read
    return params


def _load_leaf(
    leaf: Leaf, tensors: Iterable[np.ndarray], count: int, dtype: DTypeLike
) -> np.ndarray:
    is_stacked, is_applied = leaf.path[0] == "layers", leaf.path != ("embed",)
    shape = leaf.shape[::-1] if is_applied else leaf.shape
    stacked = np.empty((count, *shape), jnp.dtype(dtype))
    for i, tensor in enumerate(tensors):
        stacked[i] = tensor.T if is_applied else tensor
    return stacked if is_stacked else stacked[0]


def _listed(names: Iterable[str], limit: int = 8) -> str:
    names = sorted(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} tensor(s): " + ", ".join(names[:limit]) + rest
