"""Fills a pool from PEFT's folders."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from lora_jax import paths
from lora_jax.interop import peft
from lora_jax.interop.model import Pretrained
from lora_jax.methods import LoRA
from lora_jax.serving.bank import make_bank
from lora_jax.serving.normal_form import NormalForm, normal_form
from lora_jax.serving.pool import Pool
from lora_jax.targets import as_rules, match_rules
from lora_jax.transform import Delta
from lora_jax.weights import PyTree, is_weight


class PeftStore:
    """A catalog's `Store` of PEFT's folders."""

    def __init__(self, model: Pretrained):
        self._model = model
        self._names = peft.model_names(model.config)
        self._ahead: dict[Path, Delta] = {}
        self._pool: Pool | None = None

    def read_ahead(self, folders: Iterable[Path]) -> list[Delta]:
        """The adapters of `folders` that can be read; `read` then returns them from memory."""
        for folder in folders:
            try:
                self._ahead[folder] = self.read(folder)
            except (OSError, ValueError):  # which `read` raises again, where it is reported
                continue
        return list(self._ahead.values())

    def put_into(self, pool: Pool) -> None:
        self._pool = pool

    def read(self, folder: Path) -> Any:
        if folder in self._ahead:
            return self._ahead.pop(folder)
        return jax.device_get(peft.load_adapter(folder, self._model.params, self._names))

    def put(self, name: str, adapter: Any) -> None:
        self._pooled().add(name, adapter)

    def drop(self, name: str) -> None:
        self._pooled().remove(name)

    def _pooled(self) -> Pool:
        assert self._pool is not None, "put_into comes first"
        return self._pool


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
