"""Fills a pool from PEFT's folders."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lora_jax import paths
from lora_jax.interop import peft
from lora_jax.interop.model import Pretrained
from lora_jax.methods import LoRA
from lora_jax.serving.bank import Bank, make_bank
from lora_jax.serving.normal_form import NormalForm, normal_form
from lora_jax.serving.packing import NoRoomError
from lora_jax.serving.placement import Placement
from lora_jax.serving.pool import Pool
from lora_jax.targets import as_rules, match_rules
from lora_jax.weights import PyTree, is_weight

Forms = Mapping[str, NormalForm]  # of one adapter, by path


class PeftStore:
    """A catalog's `Store` of PEFT's folders. What it reads are normal forms."""

    def __init__(self, model: Pretrained):
        self._model = model
        self._names = peft.model_names(model.config)
        self._ahead: dict[Path, Forms] = {}
        self._pool: Pool | None = None

    def read_ahead(self, folders: Iterable[Path]) -> list[Forms]:
        """The adapters of `folders` that can be served; `read` then returns them from memory."""
        for folder in folders:
            try:
                self._ahead[folder] = self.read(folder)
            except (OSError, ValueError):  # which `read` raises again, where it is reported
                continue
        return list(self._ahead.values())

    def put_into(self, pool: Pool) -> None:
        self._pool = pool

    def read(self, folder: Path) -> Forms:
        if folder in self._ahead:
            return self._ahead.pop(folder)
        params = self._model.params
        return normal_form(params, jax.device_get(peft.load_adapter(folder, params, self._names)))

    def put(self, name: str, adapter: Any) -> None:
        try:
            self._pooled().add_forms(name, adapter)
        except NoRoomError as error:
            raise ValueError(
                f"{error} A server's bank has room for LoRA of --max-rank on all linear weights, "
                "and for what is in --adapters when it starts."
            ) from None

    def drop(self, name: str) -> None:
        self._pooled().remove(name)

    def _pooled(self) -> Pool:
        assert self._pool is not None, "put_into comes first"
        return self._pool


def make_pool(
    params: PyTree,
    adapters: Sequence[Forms],
    *,
    rows: int,
    slots: int,
    max_rank: int,
    placement: Placement | None = None,
) -> Pool:
    """An empty pool with room for adapters such as `adapters`, and for LoRA on all linear weights.

    Every running row finds room for an adapter of the highest rank. The bank is placed on devices
    as the params are.
    """
    forms = [(path, form) for adapter in adapters for path, form in adapter.items()]
    rank = max([max_rank, *(form.rank for _, form in forms)])
    others = sorted({path for path, _ in forms} - _linear(params))
    pre = sorted({path for path, form in forms if form.pre is not None})
    post = sorted({path for path, form in forms if form.post is not None})

    def made() -> Bank:
        return make_bank(
            params,
            pages=max(2 * slots, rows * -(-rank // 8)),
            slots=slots,
            targets=("all-linear", *others),
            widest=rank,
            pre=pre or None,
            post=post or None,
        )

    return Pool(params, made() if placement is None else placement.bank(made, params))


def _linear(params: PyTree) -> set[str]:
    flat = paths.flatten(params, is_leaf=is_weight)
    return {match.path for match in match_rules(flat, as_rules(LoRA(rank=1), "all-linear"), {})}
