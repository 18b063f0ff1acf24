"""The 4-bit weights of a bitsandbytes checkpoint, kept bit for bit."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax.interop.placing import Place, StoredLeaf
from lora_jax.quant import Blockwise, from_bitsandbytes
from lora_jax.quant.bitsandbytes import quant_state

_STATE = ".quant_state.bitsandbytes__"
_BESIDE = re.compile(r"\.(?:quant_state\.bitsandbytes__.*|(?:nested_)?(?:absmax|quant_map))$")
_STATE_BYTES = 4096  # bitsandbytes writes less than 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight (out, in) stored in 4 bits; `fetch` reads it and the tensors of its state."""

    source: str
    name: str
    shape: tuple[int, ...]
    fetch: Callable[[], Mapping[str, np.ndarray]]

    def read(self, dtype: DTypeLike) -> Blockwise:
        """The weight (in, out), which stands for values of `dtype`."""
        try:
            weight = from_bitsandbytes(self.fetch(), self.name)
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from None
        return dataclasses.replace(weight, dense_dtype=jnp.dtype(dtype))


def take_packed(tensors: dict[str, Any], source: str) -> dict[str, Packed]:
    """Removes the 4-bit weights, and the tensors of their states, from `tensors` (name to file).

    Raises:
      ValueError: a weight has two states, or one that is not the JSON of bitsandbytes.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for key in [key for key in tensors if _STATE in key]:
        name = key.partition(_STATE)[0]
        if name in shapes:
            raise ValueError(f"{source}: {name} has two quant_states, expected one.")
        shapes[name] = _shape(tensors[key], key, source)
    files: dict[str, dict[str, Any]] = {name: {} for name in shapes}
    for key in list(tensors):
        name = key if key in files else _BESIDE.sub("", key)
        if name in files:
            files[name][key] = tensors.pop(key)
    return {
        name: Packed(source=source, name=name, shape=shape, fetch=_fetcher(files[name]))
        for name, shape in shapes.items()
    }


def keep_packed(place: Place, dtype: DTypeLike) -> Place:
    """`place` for all leaves but those whose tensors are `Packed`, which stay packed."""

    def placed(path: str, leaf: StoredLeaf) -> Any:
        tensors = [open_tensor() for open_tensor in leaf.tensors]
        packed = [tensor for tensor in tensors if isinstance(tensor, Packed)]
        if not packed:
            return place(path, leaf)
        if len(packed) < len(tensors) or path == "embed":
            raise ValueError(
                f"{packed[0].source}: of {path}, {len(packed)} of {len(tensors)} tensors are in 4 "
                "bits. Layers are scanned, so that all must be; the embedding must not."
            )
        weights = []
        for tensor in packed:
            weights.append(tensor.read(dtype))
            leaf.on_read(leaf.nbytes // len(tensors))
        if len({_format(weight) for weight in weights}) > 1:
            raise ValueError(f"{packed[0].source}: layers of {path} are quantised differently.")
        return jax.tree.map(lambda *xs: jnp.stack(xs), *weights) if leaf.is_stacked else weights[0]

    return placed


def _format(weight: Blockwise) -> tuple[Any, ...]:
    leaves, structure = jax.tree.flatten(weight)
    return structure, *(leaf.shape for leaf in leaves)


def _fetcher(files: Mapping[str, Any]) -> Callable[[], dict[str, np.ndarray]]:
    def fetch() -> dict[str, np.ndarray]:
        for key, file in files.items():
            if (dtype := file.get_slice(key).get_dtype()) not in ("U8", "F32"):
                raise ValueError(f"{key} is {dtype}; bitsandbytes writes U8 and F32.")
        return {key: file.get_tensor(key) for key, file in files.items()}

    return fetch


def _shape(file: Any, name: str, source: str) -> tuple[int, ...]:
    """The weight's shape, from its state."""
    piece = file.get_slice(name)
    if piece.get_dtype() != "U8" or math.prod(piece.get_shape()) > _STATE_BYTES:
        raise ValueError(f"{source}: {name} is not what bitsandbytes writes: it is no short text.")
    try:
        _, state = quant_state({name: file.get_tensor(name)}, name.partition(_STATE)[0])
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return tuple(state["shape"])
