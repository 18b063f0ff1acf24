"""A pool's adapters as an engine wants them, and as PEFT's folders hold them."""

import collections
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from lora_jax import paths
from lora_jax.interop import peft
from lora_jax.interop.model import Pretrained
from lora_jax.methods import LoRA
from lora_jax.serving.adapters import Place, UnavailableError
from lora_jax.serving.bank import Bank, Rows, make_bank
from lora_jax.serving.normal_form import NormalForm, normal_form
from lora_jax.serving.pool import BankFull, Lease, Pool
from lora_jax.serving.served import bind
from lora_jax.targets import as_rules, match_rules
from lora_jax.transform import Delta
from lora_jax.weights import PyTree, is_weight


class PooledAdapters:
    """An engine's `Adapters` over a pool. A name that is in use is not replaced."""

    def __init__(self, pool: Pool):
        self.pool = pool
        self._leases: dict[str, list[Lease]] = collections.defaultdict(list)
        self._versions: dict[str, int] = collections.defaultdict(int)

    @property
    def bank(self) -> Bank:
        return self.pool.bank

    @property
    def widths(self) -> tuple[int, ...]:
        """1, 2, 4, ... up to the widest adapter that the bank takes."""
        return tuple(1 << power for power in range((self.bank.widest - 1).bit_length() + 1))

    def __contains__(self, name: str) -> bool:
        return name in self._versions

    def add(self, name: str, delta: Delta) -> None:
        self.pool.add(name, delta)
        self._versions[name] += 1

    def remove(self, name: str) -> None:
        self.pool.remove(name)
        del self._versions[name]

    def acquire(self, name: str) -> Place | None:
        if name not in self:
            raise UnavailableError(f"the adapter {name!r} was unloaded.")
        try:
            lease = self.pool.acquire(name)
        except BankFull:
            return None
        self._leases[name].append(lease)
        return Place(lease.place.pages, lease.place.slot, self._versions[name])

    def release(self, name: str) -> None:
        self.pool.release(self._leases[name].pop())
        if not self._leases[name]:
            del self._leases[name]

    def bind(self, base: PyTree, bank: Bank, pages: jax.Array, slots: jax.Array) -> PyTree:
        return bind(base, bank, Rows(pages, slots))


class PeftStore:
    """A catalog's `Store` of PEFT's folders."""

    def __init__(self, model: Pretrained):
        self._model = model
        self._names = peft.model_names(model.config)
        self._ahead: dict[Path, Delta] = {}
        self._adapters: PooledAdapters | None = None

    def read_ahead(self, folders: Iterable[Path]) -> list[Delta]:
        """What can be read of `folders`, which `read` then returns without reading it again."""
        for folder in folders:
            try:
                self._ahead[folder] = self.read(folder)
            except (OSError, ValueError):  # which `read` raises again, to whoever reports it
                continue
        return list(self._ahead.values())

    def put_into(self, adapters: PooledAdapters) -> None:
        self._adapters = adapters

    def read(self, folder: Path) -> Any:
        if folder in self._ahead:
            return self._ahead.pop(folder)
        return jax.device_get(peft.load_adapter(folder, self._model.params, self._names))

    def put(self, name: str, adapter: Any) -> None:
        self._pooled().add(name, adapter)

    def drop(self, name: str) -> None:
        self._pooled().remove(name)

    def _pooled(self) -> PooledAdapters:
        assert self._adapters is not None, "put_into comes first"
        return self._adapters


def make_pool(
    params: PyTree, deltas: Sequence[Delta], *, rows: int, slots: int, max_rank: int
) -> Pool:
    """An empty pool with room for adapters such as `deltas`, and for LoRA on all linear weights.

    Every running row finds room for an adapter of the highest rank.
    """
    forms = _servable(params, deltas)
    rank = max([max_rank, *(form.rank for _, form in forms)])
    pages = max(2 * slots, rows * -(-rank // 8))
    others = sorted({path for path, _ in forms} - _linear(params))
    pre = sorted({path for path, form in forms if form.pre is not None})
    post = sorted({path for path, form in forms if form.post is not None})
    bank = make_bank(
        params,
        pages=pages,
        slots=slots,
        targets=("all-linear", *others),
        widest=rank,
        pre=pre or None,
        post=post or None,
    )
    return Pool(params, bank)


def _linear(params: PyTree) -> set[str]:
    flat = paths.flatten(params, is_leaf=is_weight)
    return {match.path for match in match_rules(flat, as_rules(LoRA(rank=1), "all-linear"), {})}


def _servable(params: PyTree, deltas: Sequence[Delta]) -> list[tuple[str, NormalForm]]:
    found: list[tuple[str, NormalForm]] = []
    for delta in deltas:
        try:
            found += normal_form(params, delta).items()
        except ValueError:  # which adding it to the pool raises again
            continue
    return found
