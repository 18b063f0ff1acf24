"""What an experiment takes of each finished run beside its validation loss."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_jax.transform import Delta

Numbers = dict[str, float]
Measured = Callable[[Delta], Numbers]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measures:
    """Numbers that all runs share, whatever loss each learns by.

    Attributes:
      of: `(shared) -> (delta) -> {name: number}`, called once an experiment, with its `run.Shared`.
      names: of the numbers, in the order of a table's columns.
      compared: the name of that by which runs and cells are compared.
      highest: whether more of it is better.
    """

    of: Callable[[Any], Measured]
    names: Sequence[str]
    compared: str
    highest: bool = True

    def better(self, rows: Sequence[Mapping[str, Any]]) -> int | None:
        """The index of the best row, of those that have been measured."""
        found = [(self._order(row), index) for index, row in enumerate(rows) if row["measured"]]
        return min(found, default=(0.0, None))[1]

    def _order(self, row: Mapping[str, Any]) -> float:
        value = row["measured"][self.compared]
        return -value if self.highest else value


def compared_by(measures: Measures | None) -> dict[str, Any]:
    """What a comparison goes by, as results hold it: by default the validation loss."""
    if measures is None:
        return {"by": "validation loss", "highest": False}
    return {"by": measures.compared, "highest": measures.highest}
