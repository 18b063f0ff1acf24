"""A loss as a value: it owns its batch."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lora_jax.training.losses.fields import Fields, abstract_batch, check_batch
from lora_jax.training.losses.settings import Settings, checked
from lora_jax.transform import Delta
from lora_jax.weights import PyTree

Batch = Mapping[str, Any]
LossSum = Callable[..., tuple[jax.Array, jax.Array]]  # (delta, base, batch, dropout_key)


@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
    """`loss(delta, base, batch, dropout_key) -> (total, count)`, and its declaration of its batch.

    Called, it checks the batch, by shapes alone: under `jit` when it is traced.

    Attributes:
      name: in errors, and in `LOSSES`.
      fields: the arrays of a batch, by name.
      sums: `(delta, base, batch, dropout_key, **settings)` to the loss summed over the batch's
        units that count, and their number, both float32 scalars. `dropout_key` None turns dropout
        off.
      unit: what counts: "token", "pair".
      positions: returns how many positions of a batch are not padding, for throughput.
      settings: what it takes by keyword, such as DPO's beta. The arms of a sweep may each have
        their own, `init_state(..., settings=loss.settings_of(beta=0.3))`.

    A call raises ValueError for a batch that is not of these fields (see `check_batch`), and for a
    setting that is unknown or out of range.
    """

    name: str
    fields: Fields
    sums: LossSum
    unit: str
    positions: Callable[[Batch], Any]
    settings: Settings = dataclasses.field(default_factory=dict)

    def __call__(
        self,
        delta: Delta,
        base: PyTree,
        batch: Batch,
        dropout_key: jax.Array | None,
        **settings: Any,
    ) -> tuple[jax.Array, jax.Array]:
        check_batch(f"the loss {self.name}", self.fields, batch)
        given = self.settings_of(**settings)
        values = {name: setting.value for name, setting in self.settings.items()}
        return self.sums(delta, base, batch, dropout_key, **(values | given))

    def settings_of(self, **given: Any) -> dict[str, Any]:
        """What is given, checked, as arrays.

        Raises:
          ValueError: for a setting that the loss does not have, or a value that it does not take.
        """
        return checked(f"the loss {self.name}", self.settings, given)

    def abstract_batch(self, rows: int, positions: int) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch of so many rows of so many positions, by shape and dtype alone."""
        return abstract_batch(self.fields, rows, positions)
