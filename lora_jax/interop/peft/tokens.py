"""PEFT's trainable_token_indices: new rows of the embedding table, or of the output head."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.interop.peft.model import Model, Tensors
from lora_jax.interop.peft.names import HEAD, TABLE, Slot
from lora_jax.interop.peft.tied import ROWS, refuse_rows_of_one
from lora_jax.methods import FullNode


def from_peft(config: Mapping[str, Any], tensors: Tensors, model: Model) -> dict[str, FullNode]:
    """Removes the rows from `tensors`; returns them as `Full`, zero except in these rows."""
    stated = config.get("trainable_token_indices")
    if stated is None:
        return {}
    stated = stated if isinstance(stated, dict) else {TABLE: stated}
    nodes: dict[str, FullNode] = {}
    for end, indices in stated.items():
        slot = next((slot for slot in model.slots.values() if slot.module.endswith(end)), None)
        if slot is None and model.is_tied and end == HEAD and indices == stated.get(TABLE):
            continue  # it follows the table
        if slot is None or slot.suffix not in (HEAD, TABLE):
            raise ValueError(
                f"{model.source}: trainable_token_indices names {end!r}, which is neither the "
                "embedding table nor the output head of this base."
            )
        nodes[slot.path] = _rows(slot, indices, tensors, model)
    if {slot.suffix for slot in model.slots.values() if slot.path in nodes} == {TABLE}:
        refuse_rows_of_one(model)
    return nodes


def _rows(slot: Slot, indices: Any, tensors: Tensors, model: Model) -> FullNode:
    name, base = f"{slot.module}.{ROWS}", model.value(slot.path)
    fits = isinstance(indices, list) and all(type(index) is int for index in indices)
    if not fits or not all(0 <= index < len(base) for index in indices):
        raise ValueError(
            f"{model.source}: trainable_token_indices of {slot.module} is {indices!r:.200}, "
            f"expected a list of integers below {len(base)}."
        )
    if name not in tensors:
        raise ValueError(f"{model.source} lacks {name}, the rows of trainable_token_indices.")
    rows = np.asarray(tensors.pop(name), np.float32)
    if rows.shape != (len(indices), base.shape[1]) or len(set(indices)) != len(indices):
        raise ValueError(
            f"{model.source}: {name} has shape {rows.shape}, expected a row of {base.shape[1]} for "
            f"each of the {len(set(indices))} different indices that its config lists."
        )
    delta = np.zeros_like(base)
    delta[indices] = rows - base[indices]
    return FullNode(delta=jnp.asarray(model.from_torch(slot.path, delta)))
