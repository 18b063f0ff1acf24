"""What an engine needs of a pool of adapters."""

import dataclasses
from typing import Any, Protocol

import jax

from lora_jax.weights import PyTree


class UnavailableError(Exception):
    """An adapter is gone from the pool, or can no longer be read."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the bank holds an adapter.

    Attributes:
      pages: the numbers of its pages of ranks.
      slot: its entry of vectors; -1 is the base.
      version: changes when the name stands for other values: what one version read is not shared
        with another.
    """

    pages: tuple[int, ...] = ()
    slot: int = -1
    version: int = 0


class Adapters(Protocol):
    """Adapters by name over one base.

    Attributes:
      bank: arrays on the device, an argument of every step, of the same shapes for ever.
      widths: the numbers of pages a row, ascending, that steps are compiled for.
    """

    @property
    def bank(self) -> PyTree: ...

    @property
    def widths(self) -> tuple[int, ...]: ...

    def __contains__(self, name: str) -> bool: ...

    def acquire(self, name: str) -> Place | None:
        """Puts the adapter in the bank, to stay as it is until it is released as many times; None
        while all slots are taken. Raises UnavailableError for one that is not there."""
        ...

    def release(self, name: str) -> None: ...

    def bind(self, base: PyTree, bank: PyTree, pages: jax.Array, slots: jax.Array) -> PyTree:
        """Weights for a batch whose rows use `pages [B, w]` (-1 for none) and `slots [B]`; pure."""
        ...


class BaseAlone:
    """No adapters."""

    bank: Any = ()
    widths = (1,)

    def __contains__(self, name: str) -> bool:
        return False

    def acquire(self, name: str) -> Place | None:
        raise UnavailableError(f"{name!r}: this engine serves its base alone.")

    def release(self, name: str) -> None:
        raise AssertionError(name)

    def bind(self, base: PyTree, bank: PyTree, pages: jax.Array, slots: jax.Array) -> PyTree:
        return base
