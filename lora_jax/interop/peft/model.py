"""The model of an adapter that is read or written."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.interop.peft.names import HEAD, TABLE, Names, Slot, slots_of
from lora_jax.layouts import Layout
from lora_jax.weights import dense, is_weight

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Model:
    """Leaves, concrete or abstract, and their PyTorch modules.

    Attributes:
      source: the adapter's folder, for messages.
      leaves: `{path: leaf}`.
      names: `{path: module}`.
      layouts: of leaves that are more than stacked matrices.
      slots: `{module: Slot}` of every matrix.
      num_kv_heads: of the attention, where it is known.
      read: `{path: array}` of the leaves whose values were read, in PyTorch's layout.
    """

    source: str
    leaves: Mapping[str, Any]
    names: Names
    layouts: Mapping[str, Layout | None]
    slots: Mapping[str, Slot]
    num_kv_heads: int | None = None
    read: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def leaf(self, path: str) -> Any:
        return self.leaves[path]

    def layout(self, path: str) -> Layout:
        return self.layouts.get(path) or Layout()

    def dims(self, path: str) -> tuple[tuple[int, ...], ...]:
        return self.layout(path).split(self.leaves[path].shape)

    def by_path(self) -> dict[str, list[Slot]]:
        """The slots of each leaf, by layer."""
        grouped: dict[str, list[Slot]] = {}
        for slot in self.slots.values():
            grouped.setdefault(slot.path, []).append(slot)
        return grouped

    def slots_at(self, nodes: Iterable[str]) -> list[Slot]:
        """The slots of the leaves at these paths.

        Raises:
          ValueError: for a path without a name.
        """
        grouped = self.by_path()
        if unnamed := [path for path in nodes if path not in grouped]:
            raise ValueError(
                f"{', '.join(unnamed)}: no PyTorch module is named for this path. Add it to names, "
                'such as {"layers/attn/q_proj": "model.layers.{}.self_attn.q_proj"}.'
            )
        return [slot for path in nodes for slot in grouped[path]]

    @property
    def is_tied(self) -> bool:
        """Whether the output head is the embedding table itself: there is a table, and no head."""
        suffixes = {slot.suffix for slot in self.slots.values()}
        return TABLE in suffixes and HEAD not in suffixes

    def bias_of(self, path: str) -> str | None:
        """The path of the bias that the model adds after the weight at `path`."""
        bias_name = f"{self.names[path]}.bias"
        return next((bias for bias, name in self.names.items() if name == bias_name), None)

    def tensors(self) -> dict[str, tuple[str, int | None]]:
        """`{tensor: (path, layer)}` of the whole model, by PyTorch's names; of leaves that are not
        stacked the layer is None."""
        found: dict[str, tuple[str, int | None]] = {}
        for path, template in self.names.items():
            name = template if template.endswith(".bias") else f"{template}.weight"
            for layer in range(self._layers(path)) if "{}" in template else [None]:
                found[name.format(layer)] = path, layer
        return found

    def value(self, path: str, layer: int | None = None) -> np.ndarray:
        """A leaf of the base, or a layer of one, float32, in PyTorch's layout.

        Raises:
          ValueError: for a leaf that is a shape alone.
        """
        leaf = self.leaf(path)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                f"{self.source}: {path}: the base's own weights are needed here, found their shape "
                "alone."
            )
        if path not in self.read:
            self.read[path] = self.as_torch(path, np.asarray(dense(leaf), np.float32))
        return self.read[path] if layer is None else self.read[path][layer]

    def as_torch(self, path: str, leaf: np.ndarray) -> np.ndarray:
        """An array of the leaf's shape in PyTorch's layout, by layer: matrices (out, in), tables
        unchanged, and biases as vectors."""
        if self._is_bias(path):
            return leaf.reshape(*leaf.shape[: "{}" in self.names[path]], -1)
        if not self._is_matrix(path):
            return leaf
        matrix = np.asarray(self.layout(path).to_matrix(jnp.asarray(leaf)))
        return matrix if self._is_table(path) else np.swapaxes(matrix, -1, -2)

    def from_torch(self, path: str, value: np.ndarray) -> np.ndarray:
        """The inverse of `as_torch`."""
        shape = tuple(self.leaf(path).shape)
        if not self._is_matrix(path):
            return value.reshape(shape)
        matrix = value if self._is_table(path) else np.swapaxes(value, -1, -2)
        return np.asarray(self.layout(path).from_matrix(jnp.asarray(matrix), shape))

    def _layers(self, path: str) -> int:
        return self.dims(path)[0][0] if self._is_matrix(path) else self.leaf(path).shape[0]

    def _is_matrix(self, path: str) -> bool:
        return path in self.by_path()

    def _is_bias(self, path: str) -> bool:
        return self.names[path].endswith(".bias")

    def _is_table(self, path: str) -> bool:
        return self.names[path].endswith(TABLE)


def model_of(
    source: str,
    params: Any,
    names: Names,
    layouts: Mapping[str, Layout | None] | None,
    num_kv_heads: int | None = None,
) -> Model:
    leaves = paths.flatten(params, is_leaf=is_weight)
    layouts = layouts or {}
    return Model(source, leaves, names, layouts, slots_of(leaves, names, layouts), num_kv_heads)
