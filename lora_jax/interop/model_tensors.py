"""A params tree, leaf by leaf, under the names that checkpoints give its tensors."""

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
from lora_jax.models.config import DecoderConfig
from lora_jax.models.family import Parameter
from lora_jax.paths import flatten, nest
from lora_jax.quant import Quantized

Naming = Literal["gguf", "huggingface"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileTensor:
    """A tensor as a file will hold it, (out, in); `fetch` brings it to the host.

    Of a quantised matrix, `fetch` returns one layer's weight, of `packed_bytes`.
    """

    shape: tuple[int, ...]
    fetch: Callable[[], Any]
    packed_bytes: int | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def nbytes(self, dtype: np.dtype) -> int:
        """Its bytes in a file of `dtype`."""
        return self.size * dtype.itemsize if self.packed_bytes is None else self.packed_bytes


def leaves_of(config: DecoderConfig, naming: Naming) -> tuple[Parameter, ...]:
    """The leaves of a model of this shape, in the tree's order.

    Raises:
      ValueError: where files of that naming have no names for this family.
    """
    leaves = config.family.parameters(config)
    if naming == "gguf" and config.family.gguf is None:
        raise ValueError(
            f"{type(config).__name__}: this family has no {naming} names here. Write a Hugging "
            "Face folder, save_huggingface(folder, model)."
        )
    return leaves


def names_of(leaf: Parameter, naming: Naming, num_layers: int) -> list[str]:
    """The names of a leaf's tensors, one a layer of a stacked leaf."""
    template = getattr(leaf, naming)
    return [template.format(i) for i in range(num_layers)] if leaf.is_stacked else [template]


def check_tensors(
    config: DecoderConfig, naming: Naming, found: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Raises ValueError unless `found` (name to shape) is exactly the model's set of tensors."""
    if config.num_layers > len(found):  # else a flipped bit makes the names below fill the memory
        raise ValueError(
            f"{source} claims {config.num_layers} layers but holds {len(found)} tensors; the file "
            "is incomplete or corrupt."
        )
    expected = {
        name: leaf.shape
        for leaf in leaves_of(config, naming)
        for name in names_of(leaf, naming, config.num_layers)
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
    config: DecoderConfig,
    naming: Naming,
    read: Callable[[str], Any],
    dtype: DTypeLike,
    place: Place = on_device,
) -> dict:
    """Builds the params tree leaf by leaf: `place` makes each from the stored tensors.

    `read(name)` returns the named tensor in the file's order, (out, in): an array, or an object
    that returns one when it is indexed. Leaves other than the embedding are transposed, since the
    model applies weights from the right.
    """
    leaves = {leaf.path: leaf for leaf in leaves_of(config, naming)}
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
    leaf: Parameter,
    config: DecoderConfig,
    naming: Naming,
    read: Callable[[str], Any],
    dtype: DTypeLike,
    on_read: Callable[[int], None],
) -> StoredLeaf:
    names = names_of(leaf, naming, config.num_layers)
    return StoredLeaf(
        shape=leaf.shape_in_tree(config.num_layers),
        dtype=jnp.dtype(dtype),
        tensors=[functools.partial(read, name) for name in names],
        is_stacked=leaf.is_stacked,
        is_transposed=leaf.is_transposed,
        on_read=on_read,
    )


def disassemble(
    params: Mapping[str, Any], config: DecoderConfig, naming: Naming
) -> dict[str, FileTensor]:
    """The inverse of `assemble`: the file's tensors by name, each fetched in its turn.

    Raises:
      ValueError: a leaf is missing, unexpected, of the wrong shape, or not a plain array; for a
        Hugging Face folder, it may be a quantised weight as well.
    """
    leaves = {leaf.path: leaf for leaf in leaves_of(config, naming)}
    found = flatten(params, is_leaf=lambda node: not isinstance(node, Mapping))
    if found.keys() != leaves.keys():
        raise ValueError(
            f"the params and the config differ: missing {sorted(leaves.keys() - found.keys())}, "
            f"unexpected {sorted(found.keys() - leaves.keys())}."
        )
    tensors: dict[str, FileTensor] = {}
    for path, leaf in leaves.items():
        array, names = found[path], names_of(leaf, naming, config.num_layers)
        is_packed = isinstance(array, Quantized) and naming == "huggingface"
        if not is_packed and not isinstance(array, jax.Array | np.ndarray):
            raise ValueError(
                f"{path} is a {type(array).__name__}, and only plain arrays can be exported: "
                "merge adapters and dequantise first, by merge(base, delta) and dequantize(params)."
            )
        shape = leaf.shape_in_tree(config.num_layers)
        if array.shape != shape:
            raise ValueError(f"{path} has shape {array.shape}, but the config asks for {shape}.")
        for i, name in enumerate(names):
            fetch = functools.partial(_layer if is_packed else _tensor, array, leaf, i)
            packed_bytes = array.nbytes // len(names) if is_packed else None
            tensors[name] = FileTensor(shape=leaf.shape, fetch=fetch, packed_bytes=packed_bytes)
    return tensors


def _tensor(array: Any, leaf: Parameter, layer: int) -> np.ndarray:
    tensor = np.asarray(array[layer] if leaf.is_stacked else array)
    return np.ascontiguousarray(tensor.T if leaf.is_transposed else tensor)


def _layer(weight: Quantized, leaf: Parameter, layer: int) -> Quantized:
    return jax.tree.map(lambda x: x[layer], weight) if leaf.is_stacked else weight


def _listed(names: Iterable[str], limit: int = 8) -> str:
    names = sorted(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} tensor(s): " + ", ".join(names[:limit]) + rest
