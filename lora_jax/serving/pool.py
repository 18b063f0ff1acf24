"""A pool of adapters on the host, by name, some of which are in the bank."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import cast

import jax

from lora_jax.serving.adapters import BankFull, Lease, UnavailableError
from lora_jax.serving.bank import Bank, Place, Rows
from lora_jax.serving.normal_form import NormalForm, normal_form
from lora_jax.serving.packing import Packed, pack, put
from lora_jax.serving.served import bind
from lora_jax.transform import Delta
from lora_jax.weights import PyTree


@dataclasses.dataclass(eq=False)
class _Version:
    """One adapter that was added under a name. While it has users it is in the bank, even if
    another has got the name."""

    name: str
    adapter: Packed
    number: int
    place: Place | None = None
    users: int = 0


class Pool:
    """Adapters of one base behind a bank of fewer.

        pool.add("french", delta)
        lease = pool.acquire("french")          # puts it into the bank, if it is not there
        weights = bind(base, pool.bank, rows_of([lease.place, None]))
        pool.release(lease)

    An adapter that is in use keeps its place. Others are evicted, first those that were released
    the longest ago. Adding under a name that exists replaces it: users of the former adapter keep
    it until they release it. Not safe for several threads at once.

    Attributes:
      bank: to be bound; `acquire` replaces it, and donates the former one.
    """

    def __init__(self, base: PyTree, bank: Bank):
        self.bank = bank
        self._base = base
        self._named: dict[str, _Version] = {}
        self._leases: dict[Lease, _Version] = {}
        self._added = 0
        # Versions in the bank without users, the longest released first.
        self._idle: collections.OrderedDict[_Version, None] = collections.OrderedDict()
        self._pages = list(range(bank.pages))[::-1]
        self._slots = list(range(bank.slots))[::-1]

    def add(self, name: str, delta: Delta) -> None:
        """Adds an adapter, on the host and in the bank's dtype, under a name.

        Raises:
          ValueError: for an adapter of another base, one without a normal form, or one that an
            empty bank has no room for. The former adapter then keeps the name.
        """
        self.add_forms(name, normal_form(self._base, delta))

    def add_forms(self, name: str, forms: Mapping[str, NormalForm]) -> None:
        """`add` of an adapter's `normal_form`, which any thread can compute.

        Raises:
          ValueError: for one that an empty bank has no room for.
        """
        adapter = pack(self.bank, forms)
        if len(adapter.pages) > self.bank.pages:
            raise ValueError(
                f"{name}: an adapter of {len(adapter.pages)} pages does not fit a bank of "
                f"{self.bank.pages}: make it larger."
            )
        self._forget(self._named.get(name))
        self._added += 1
        self._named[name] = _Version(name, adapter, self._added)

    def acquire(self, name: str) -> Lease:
        """The adapter in the bank, in use until it is released.

        Raises:
          UnavailableError: for a name that is not known.
          BankFull: where adapters in use leave too little room; nothing has changed.
        """
        version = self._version(name)
        if version.place is None:
            place = self._make_room(version)
            self.bank = put(self.bank, place, version.adapter)
            version.place = place
        self._idle.pop(version, None)
        version.users += 1
        lease = Lease(name, cast(Place, version.place), version.number)
        self._leases[lease] = version
        return lease

    def release(self, lease: Lease) -> None:
        """Ends one use.

        Raises:
          ValueError: for a lease that was released before.
        """
        if lease not in self._leases:
            raise ValueError(f"this use of {lease.name!r} was released before.")
        version = self._leases.pop(lease)
        version.users -= 1
        if version.users:
            return
        if self._named.get(version.name) is version:
            self._idle[version] = None
        else:
            self._vacate(version)

    def remove(self, name: str) -> None:
        """Removes an adapter; its users keep it until they release it.

        Raises:
          ValueError: for a name that is not known.
        """
        self._forget(self._version(name))
        del self._named[name]

    def bind(self, base: PyTree, bank: Bank, pages: jax.Array, slots: jax.Array) -> PyTree:
        """Weights for rows that use `pages [B, w]` and `slots [B]`; pure."""
        return bind(base, bank, Rows(pages, slots))

    def __contains__(self, name: str) -> bool:
        return name in self._named

    @property
    def widths(self) -> tuple[int, ...]:
        """The numbers of pages a row that steps are compiled for: 1, 2, 8, 32, ... up to the widest
        adapter that the bank takes. Each has programs of its own, so they are few."""
        widest = self.bank.widest
        steps = (1, *(2 * 4**power for power in range(widest.bit_length())))
        return (*(width for width in steps if width < widest), widest)

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters, in the order in which they were added."""
        return tuple(self._named)

    @property
    def resident(self) -> tuple[str, ...]:
        """Those whose current version is in the bank."""
        return tuple(name for name, version in self._named.items() if version.place is not None)

    @property
    def nbytes(self) -> int:
        """The bytes of the adapters on the host, without those that are replaced and still in
        use."""
        adapters = [version.adapter for version in self._named.values()]
        arrays = jax.tree.leaves([tuple(adapter) for adapter in adapters])
        return sum(array.nbytes for array in arrays)

    def _version(self, name: str) -> _Version:
        if name not in self._named:
            raise UnavailableError(f"there is no adapter {name!r}: add it to the pool first.")
        return self._named[name]

    def _make_room(self, version: _Version) -> Place:
        needed = len(version.adapter.pages)
        places = [cast(Place, idle.place) for idle in self._idle]
        could_have = len(self._pages) + sum(len(place.pages) for place in places)
        if could_have < needed or not (self._slots or places):
            raise BankFull(
                f"{version.name!r} needs {needed} pages and a slot, and adapters in use leave "
                f"{could_have} of {self.bank.pages} pages and {len(self._slots) + len(places)} of "
                f"{self.bank.slots} slots: release one, or make a larger bank."
            )
        while len(self._pages) < needed or not self._slots:
            oldest, _ = self._idle.popitem(last=False)
            self._vacate(oldest)
        return Place(tuple(self._pages.pop() for _ in range(needed)), self._slots.pop())

    def _forget(self, version: _Version | None) -> None:
        """Evicts a version that loses its name at once, if it has no users."""
        if version in self._idle:
            del self._idle[cast(_Version, version)]
            self._vacate(cast(_Version, version))

    def _vacate(self, version: _Version) -> None:
        place = cast(Place, version.place)
        self._pages += place.pages
        self._slots.append(place.slot)
        version.place = None
