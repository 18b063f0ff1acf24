"""The Llama params tree, leaf by leaf, under the names that checkpoints give its tensors."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax.interop.placing import Place, StoredLeaf, on_device
from lora_jax.interop.progress import byte_progress
from lora_jax.models.config import LlamaConfig
from lora_jax.paths import flatten, nest
from lora_jax.quant import Quantized

Naming = Literal["gguf", "huggingface"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One leaf of the tree. `{}` in a name is a layer's index; `shape` is a file's (out, in)."""

    path: tuple[str, ...]
    gguf: str
    huggingface: str
    shape: tuple[int, ...]

    @property
    def is_stacked(self) -> bool:
        return self.path[0] == "layers"

    @property
    def is_transposed(self) -> bool:
        """The model applies matrices from the right, but looks rows of the embedding up."""
        return self.path != ("embed",)

    def names(self, naming: Naming, num_layers: int) -> list[str]:
        template = getattr(self, naming)
        return [template.format(i) for i in range(num_layers)] if "{}" in template else [template]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileTensor:
    """A tensor as a file will hold it, (out, in); `fetch` brings it to the host.

    Of a quantised matrix, `fetch` gives one layer's weight, of `packed_bytes`.
    """

    shape: tuple[int, ...]
    fetch: Callable[[], Any]
    packed_bytes: int | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def nbytes(self, dtype: np.dtype) -> int:
        """What it takes in a file of `dtype`."""
        return self.size * dtype.itemsize if self.packed_bytes is None else self.packed_bytes


def family_of(config: LlamaConfig) -> str:
    """ "llama", "qwen2" or "qwen3": what config.json and GGUF call models of this shape.

    Raises:
      ValueError: no family has both biases and query/key norms.
    """
    if config.qkv_bias and config.qk_norm:
        raise ValueError("no family has both qkv_bias and qk_norm; no other program would load it.")
    return "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"


def llama_leaves(config: LlamaConfig) -> list[Leaf]:
    """The leaves of a model of this shape, in the tree's order."""
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    h = config.head_dim
    q, k = config.num_heads * h, config.num_kv_heads * h
    layer, attn, mlp = (f"model.layers.{{}}.{part}" for part in ("", "self_attn.", "mlp."))
    rows = [
        ("embed", "token_embd.weight", "model.embed_tokens.weight", (v, d)),
        ("layers/attn_norm", "blk.{}.attn_norm.weight", layer + "input_layernorm.weight", (d,)),
        ("layers/attn/q_proj", "blk.{}.attn_q.weight", attn + "q_proj.weight", (q, d)),
        ("layers/attn/k_proj", "blk.{}.attn_k.weight", attn + "k_proj.weight", (k, d)),
        ("layers/attn/v_proj", "blk.{}.attn_v.weight", attn + "v_proj.weight", (k, d)),
        ("layers/attn/o_proj", "blk.{}.attn_output.weight", attn + "o_proj.weight", (d, q)),
        (
            "layers/mlp_norm",
            "blk.{}.ffn_norm.weight",
            layer + "post_attention_layernorm.weight",
            (d,),
        ),
        ("layers/mlp/gate_proj", "blk.{}.ffn_gate.weight", mlp + "gate_proj.weight", (f, d)),
        ("layers/mlp/up_proj", "blk.{}.ffn_up.weight", mlp + "up_proj.weight", (f, d)),
        ("layers/mlp/down_proj", "blk.{}.ffn_down.weight", mlp + "down_proj.weight", (d, f)),
        ("norm", "output_norm.weight", "model.norm.weight", (d,)),
    ]
    if config.qkv_bias:
        rows += [
            ("layers/attn/q_bias", "blk.{}.attn_q.bias", attn + "q_proj.bias", (q,)),
            ("layers/attn/k_bias", "blk.{}.attn_k.bias", attn + "k_proj.bias", (k,)),
            ("layers/attn/v_bias", "blk.{}.attn_v.bias", attn + "v_proj.bias", (k,)),
        ]
    if config.qk_norm:
        rows += [
            ("layers/attn/q_norm", "blk.{}.attn_q_norm.weight", attn + "q_norm.weight", (h,)),
            ("layers/attn/k_norm", "blk.{}.attn_k_norm.weight", attn + "k_norm.weight", (h,)),
        ]
    if not config.tie_embeddings:
        rows.append(("lm_head", "output.weight", "lm_head.weight", (v, d)))
    return [
        Leaf(
            path=tuple(path.split("/")),
            gguf=gguf,
            huggingface=huggingface,
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
            f"{source} lacks {_listed(missing)}, which a model of {config.num_layers} layers and "
            "this config needs; the file is incomplete, or its config is another model's."
        )
    if unexpected := found.keys() - expected.keys():
        raise ValueError(
            f"{source} holds {_listed(unexpected)}, which a model of this config has no place "
            "for; experts and further biases or norms are not supported."
        )
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise ValueError(
                f"{source}: the tensor {name!r} has shape {tuple(found[name])}, but the config "
                f"asks for {shape}; the weights and the config belong to different models."
            )


def assemble(
    config: LlamaConfig,
    naming: Naming,
    read: Callable[[str], Any],
    dtype: DTypeLike,
    place: Place = on_device,
) -> dict:
    """Builds the params tree leaf by leaf: `place` makes each of what lies in the file.

    `read(name)` returns the named tensor as the file orders it, (out, in): an array, or what gives
    one when it is indexed. Leaves other than the embedding come out transposed, since the model
    applies weights from the right.
    """
    leaves = {"/".join(leaf.path): leaf for leaf in llama_leaves(config)}
    with byte_progress(only_on_terminal=True) as bar:
        task = bar.add_task("loading")
        stored = {
            path: _stored(leaf, config, naming, read, dtype, lambda count: bar.advance(task, count))
            for path, leaf in leaves.items()
        }
        bar.update(task, total=sum(leaf.nbytes for leaf in stored.values()))
        params = {}
        for path, leaf in stored.items():
            bar.update(task, description=path)
            params[path] = place(path, leaf)
    return nest(params)


def _stored(
    leaf: Leaf,
    config: LlamaConfig,
    naming: Naming,
    read: Callable[[str], Any],
    dtype: DTypeLike,
    on_read: Callable[[int], None],
) -> StoredLeaf:
    shape = leaf.shape[::-1] if leaf.is_transposed else leaf.shape
    names = leaf.names(naming, config.num_layers)
    return StoredLeaf(
        shape=(config.num_layers, *shape) if leaf.is_stacked else shape,
        dtype=jnp.dtype(dtype),
        tensors=[functools.partial(read, name) for name in names],
        is_stacked=leaf.is_stacked,
        is_transposed=leaf.is_transposed,
        on_read=on_read,
    )


def disassemble(
    params: Mapping[str, Any], config: LlamaConfig, naming: Naming
) -> dict[str, FileTensor]:
    """What `assemble` undoes: the file's tensors by name, each to be fetched in its turn.

    Raises:
      ValueError: a leaf is missing, unexpected, of the wrong shape, or no plain array; for a
        Hugging Face folder, it may be a quantised weight as well.
    """
    leaves = {"/".join(leaf.path): leaf for leaf in llama_leaves(config)}
    found = flatten(params, is_leaf=lambda node: not isinstance(node, Mapping))
    if found.keys() != leaves.keys():
        raise ValueError(
            f"the params and the config differ: missing {sorted(leaves.keys() - found.keys())}, "
            f"unexpected {sorted(found.keys() - leaves.keys())}."
        )
    tensors: dict[str, FileTensor] = {}
    for path, leaf in leaves.items():
        array, names = found[path], leaf.names(naming, config.num_layers)
        is_packed = isinstance(array, Quantized) and naming == "huggingface"
        if not is_packed and not isinstance(array, jax.Array | np.ndarray):
            raise ValueError(
                f"{path} is a {type(array).__name__}, and only plain arrays can be exported: "
                "merge adapters and dequantise first, by merge(base, delta) and dequantize(params)."
            )
        shape = leaf.shape[::-1] if leaf.is_transposed else leaf.shape
        shape = (len(names), *shape) if leaf.is_stacked else shape
        if array.shape != shape:
            raise ValueError(f"{path} has shape {array.shape}, but the config asks for {shape}.")
        for i, name in enumerate(names):
            fetch = functools.partial(_layer if is_packed else _tensor, array, leaf, i)
            packed_bytes = array.nbytes // len(names) if is_packed else None
            tensors[name] = FileTensor(shape=leaf.shape, fetch=fetch, packed_bytes=packed_bytes)
    return tensors


def _tensor(array: Any, leaf: Leaf, layer: int) -> np.ndarray:
    tensor = np.asarray(array[layer] if leaf.is_stacked else array)
    return np.ascontiguousarray(tensor.T if leaf.is_transposed else tensor)


def _layer(weight: Quantized, leaf: Leaf, layer: int) -> Quantized:
    return jax.tree.map(lambda x: x[layer], weight) if leaf.is_stacked else weight


def _listed(names: Iterable[str], limit: int = 8) -> str:
    names = sorted(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} tensor(s): " + ", ".join(names[:limit]) + rest
