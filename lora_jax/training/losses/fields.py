"""The arrays of a batch as a loss declares them: axes by name, and a dtype.

From the declaration follow the check of a batch, abstract batches, and (in `parallel`) shardings.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

ROWS, POSITIONS = "rows", "positions"
_KINDS = {jnp.bool_: "bool", jnp.integer: "integers", jnp.floating: "floats"}


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of a batch.

    Attributes:
      axes: of each axis its name, "rows" (always the first, since a step cuts its batch along it)
        or "positions", or its fixed size: "rows positions", "rows 2 positions", "rows".
      dtype: of abstract batches. A batch may hold another dtype of the same kind: bool, integers
        or floats.
    """

    axes: str
    dtype: Any

    def __post_init__(self):
        first, *others = self.axes.split() or [""]
        known = all(axis == POSITIONS or axis.isdecimal() for axis in others)
        if first != ROWS or not known or others.count(POSITIONS) > 1:
            raise ValueError(
                f"Field({self.axes!r}): expected axes that begin with {ROWS}, and then at most one "
                f"{POSITIONS} and fixed sizes, such as '{ROWS} 2 {POSITIONS}'."
            )
        _kind(self.dtype)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.axes.split())

    def shape(self, rows: int, positions: int) -> tuple[int, ...]:
        """The shape of a batch of so many rows of so many positions."""
        counts = {ROWS: rows, POSITIONS: positions}
        return tuple(counts[axis] if axis in counts else int(axis) for axis in self.names)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape has these axes."""
        pairs = zip(self.names, shape, strict=False)
        return len(shape) == len(self.names) and all(
            size == int(axis) for axis, size in pairs if axis.isdecimal()
        )


Fields = Mapping[str, Field]


def abstract_batch(fields: Fields, rows: int, positions: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of so many rows of so many positions, by shape and dtype alone."""
    return {
        name: jax.ShapeDtypeStruct(field.shape(rows, positions), field.dtype)
        for name, field in fields.items()
    }


def check_batch(owner: str, fields: Fields, batch: Any) -> None:
    """Checks by shapes and dtypes that a batch, traced or not, holds what `owner` declares. It may
    hold more.

    Raises:
      ValueError: naming the owner and the field, for one that is missing, has other axes or another
        kind of dtype, or other numbers of rows or positions than those before it.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"{owner} takes a batch that maps {', '.join(fields)} to arrays, found "
            f"{type(batch).__name__}."
        )
    for name, field in fields.items():
        if name not in batch:
            raise ValueError(
                f"{owner} needs the field {name!r}, [{_shown(field.names)}], which the batch lacks:"
                f" it holds {', '.join(map(str, batch)) or 'nothing'}."
            )
        shape, dtype = jnp.shape(batch[name]), jnp.result_type(batch[name])
        if not field.fits(shape):
            raise ValueError(
                f"{owner}: the batch's {name!r} has shape {shape}, expected "
                f"[{_shown(field.names)}]."
            )
        if _kind(dtype) != (wanted := _kind(field.dtype)):
            raise ValueError(f"{owner}: the batch's {name!r} holds {dtype}, expected {wanted}.")
    _require_agreement(owner, fields, batch)


def _require_agreement(owner: str, fields: Fields, batch: Mapping[str, Any]) -> None:
    first: dict[str, tuple[str, int]] = {}
    for name, field in fields.items():
        named = zip(field.names, jnp.shape(batch[name]), strict=True)
        for axis, size in ((axis, size) for axis, size in named if not axis.isdecimal()):
            before, expected = first.setdefault(axis, (name, size))
            if size != expected:
                raise ValueError(
                    f"{owner}: the batch's {name!r} has {size} {axis}, {before!r} has {expected}: "
                    "expected as many in every field."
                )


def _shown(names: tuple[str, ...]) -> str:
    return ", ".join(names)


def _kind(dtype: Any) -> str:
    for kind, shown in _KINDS.items():
        if jnp.issubdtype(dtype, kind):
            return shown
    raise ValueError(f"dtype {dtype}: expected bool, integers or floats.")
