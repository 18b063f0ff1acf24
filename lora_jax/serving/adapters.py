"""The protocol of a pool of adapters, as an engine uses it."""

import dataclasses
from typing import Any, Protocol

import jax

from lora_jax.serving.bank import Place
from lora_jax.weights import PyTree


class UnavailableError(ValueError):
    """An adapter is not in the pool, or not any more."""


class BankFull(ValueError):  # noqa: N818 - not an error of the caller's
    """Every place in the bank is in use."""


@dataclasses.dataclass(frozen=True, eq=False)
class Lease:
    """One use of an adapter, from `acquire` to `release`.

    Attributes:
      name: the adapter's.
      place: where the bank holds it; it stays there until the last release.
      version: changes when another adapter gets the name: keys and values that were computed with
        one version are not shared with another.
    """

    name: str
    place: Place
    version: int = 0


BASE = Lease("", Place((), -1))


class Adapters(Protocol):
    """Adapters by name over one base.

    Attributes:
      bank: arrays on the device, an argument of every step, whose shapes do not change.
      widths: the numbers of pages a row, ascending, that steps are compiled for.
    """

    @property
    def bank(self) -> PyTree: ...

    @property
    def widths(self) -> tuple[int, ...]: ...

    def __contains__(self, name: str) -> bool: ...

    def acquire(self, name: str) -> Lease:
        """Puts the adapter in the bank, where it does not change until the lease is released.

        Raises:
          UnavailableError: for one that is not in the pool.
          BankFull: where those in use leave no room.
        """
        ...

    def release(self, lease: Lease) -> None: ...

    def bind(self, base: PyTree, bank: PyTree, pages: jax.Array, slots: jax.Array) -> PyTree:
        """Weights for a batch whose rows use `pages [B, w]` (-1 for none) and `slots [B]`; pure."""
        ...


class BaseAlone:
    """No adapters."""

    bank: Any = ()
    widths = (1,)

    def __contains__(self, name: str) -> bool:
        return False

    def acquire(self, name: str) -> Lease:
        raise UnavailableError(f"{name!r}: this engine serves its base alone.")

    def release(self, lease: Lease) -> None:
        raise AssertionError(lease)

    def bind(self, base: PyTree, bank: PyTree, pages: jax.Array, slots: jax.Array) -> PyTree:
        return base
