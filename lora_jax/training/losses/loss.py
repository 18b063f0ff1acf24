"""A loss as a value: it owns its batch."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lora_jax.training.losses.fields import Fields, abstract_batch, check_batch
from lora_jax.transform import Delta
from lora_jax.weights import PyTree

Batch = Mapping[str, Any]
LossSum = Callable[[Delta, PyTree, Batch, jax.Array | None], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
    """`loss(delta, base, batch, dropout_key) -> (total, count)`, and its declaration of its batch.

    Called, it checks the batch, by shapes alone: under `jit` when it is traced.

    Attributes:
      name: in errors, and in `LOSSES`.
      fields: the arrays of a batch, by name.
      sums: `(delta, base, batch, dropout_key)` to the loss summed over the batch's units that
        count, and their number, both float32 scalars. `dropout_key` None turns dropout off.
      unit: what counts: "token", "pair".
      positions: returns how many positions of a batch are not padding, for throughput.

    A call raises ValueError for a batch that is not of these fields; see `check_batch`.
    """

    name: str
    fields: Fields
    sums: LossSum
    unit: str
    positions: Callable[[Batch], Any]

    def __call__(
        self, delta: Delta, base: PyTree, batch: Batch, dropout_key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        check_batch(f"the loss {self.name}", self.fields, batch)
        return self.sums(delta, base, batch, dropout_key)

    def abstract_batch(self, rows: int, positions: int) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch of so many rows of so many positions, by shape and dtype alone."""
        return abstract_batch(self.fields, rows, positions)
