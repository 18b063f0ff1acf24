"""Puts adapters into a bank, page by page, and removes them."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.serving.bank import Bank, Place, Target
from lora_jax.serving.normal_form import NormalForm


class NoRoomError(ValueError):
    """A bank was made without room for such an adapter."""


class Packed(NamedTuple):
    """An adapter on the host in a bank's format: factors for each page, and vectors, by path."""

    pages: tuple[Mapping[str, tuple[np.ndarray, np.ndarray]], ...]
    vectors: Mapping[str, tuple[np.ndarray | None, np.ndarray | None]]


def pack(bank: Bank, forms: Mapping[str, NormalForm]) -> Packed:
    """The adapter in the bank's pages and dtype, on the host.

    Raises:
      NoRoomError: for a target, a rank or a scale that the bank has no room for.
      ValueError: for an adapter of another base.
    """
    for path, form in forms.items():
        _check(path, form, bank)
    p = bank.page_size
    count = max((-(-form.rank // p) for form in forms.values()), default=0)

    def page(number: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        ranks = slice(number * p, (number + 1) * p)
        return {
            path: (
                _page(form.a[..., ranks, :], p, bank.targets[path].a.dtype),
                _page(form.b[..., ranks, :], p, bank.targets[path].b.dtype),
            )
            for path, form in forms.items()
            if form.a is not None and form.b is not None and form.rank > number * p
        }

    vectors = {
        path: (form.pre, form.post)
        for path, form in forms.items()
        if form.pre is not None or form.post is not None
    }
    return Packed(tuple(page(number) for number in range(count)), vectors)


def put(bank: Bank, place: Place, adapter: Packed) -> Bank:
    """The bank with an adapter in these pages and this slot, in the place of another.

    The given bank is donated: use only the returned one. Two programs, one for a page
    and one for a slot, serve adapters of all ranks and targets.

    Raises:
      ValueError: for a place of another number of pages, or outside the bank.
    """
    _require_place(bank, place, len(adapter.pages))
    for number, factors in zip(place.pages, adapter.pages, strict=True):
        bank = _write_page(bank, np.int32(number), _all_targets(bank, factors))
    return _put_vectors(bank, place.slot, adapter.vectors)


def drop(bank: Bank, place: Place) -> Bank:
    """The bank with zeros in these pages and ones in this slot. The given bank is donated.

    A place need not be dropped before another adapter is put there.
    """
    _require_place(bank, place, len(place.pages))
    for number in place.pages:
        bank = _write_page(bank, np.int32(number), _all_targets(bank, {}))
    return _put_vectors(bank, place.slot, {})


@functools.partial(jax.jit, donate_argnums=0)
def _write_page(bank: Bank, number: jax.Array, factors: dict[str, tuple]) -> Bank:
    def write(target: Target, pair: tuple) -> Target:
        a, b = (
            replaced(into, new, number, axis=-3)
            for into, new in zip((target.a, target.b), pair, strict=True)
        )
        return dataclasses.replace(target, a=a, b=b)

    written = {path: write(target, factors[path]) for path, target in bank.targets.items()}
    return dataclasses.replace(bank, targets=written)


@functools.partial(jax.jit, donate_argnums=0)
def _write_slot(bank: Bank, slot: jax.Array, vectors: dict[str, tuple]) -> Bank:
    def write(into: jax.Array | None, new: jax.Array | None):
        return None if into is None else replaced(into, cast(Any, new), slot, axis=-2)

    written = {}
    for path, target in bank.targets.items():
        pre, post = vectors[path]
        pre, post = write(target.pre, pre), write(target.post, post)
        written[path] = dataclasses.replace(target, pre=pre, post=post)
    return dataclasses.replace(bank, targets=written)


def replaced(into: jax.Array, new: jax.Array, index: jax.Array, *, axis: int) -> jax.Array:
    """`into` with `new` at one index along an axis, in place where `into` is donated."""
    if into.dtype != jnp.bfloat16:
        return jax.lax.dynamic_update_index_in_dim(into, new, index, into.ndim + axis)
    # As bits: for a CPU, XLA (jax 0.10.2) converts all of a bfloat16 array to float32 and back to
    # update a part, 5 ms for 141 MB where this takes 0.1.
    into, new = (jax.lax.bitcast_convert_type(array, jnp.uint16) for array in (into, new))
    bits = jax.lax.dynamic_update_index_in_dim(into, new, index, into.ndim + axis)
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


def _put_vectors(bank: Bank, slot: int, vectors: Mapping[str, tuple]) -> Bank:
    if all(target.pre is None and target.post is None for target in bank.targets.values()):
        return bank
    full = {}
    for path, target in bank.targets.items():
        given = vectors.get(path, (None, None))
        full[path] = tuple(
            _vector(into, new) for into, new in zip((target.pre, target.post), given, strict=True)
        )
    return _write_slot(bank, np.int32(slot), full)


def _vector(into: jax.Array | None, new: np.ndarray | None) -> np.ndarray | None:
    if into is None:
        return None
    return np.ones((*into.shape[:-2], into.shape[-1]), np.float32) if new is None else new


def _all_targets(bank: Bank, factors: Mapping[str, tuple]) -> dict[str, tuple]:
    """The factors of a page with zeros at each target that they lack."""
    return {
        path: factors.get(path)
        or tuple(
            np.zeros((*like.shape[:-3], *like.shape[-2:]), like.dtype)
            for like in (target.a, target.b)
        )
        for path, target in bank.targets.items()
    }


def _page(ranks: np.ndarray, size: int, dtype: Any) -> np.ndarray:
    """The ranks of one page, with zeros after the last."""
    page = np.zeros((*ranks.shape[:-2], size, ranks.shape[-1]), dtype)
    page[..., : ranks.shape[-2], :] = ranks
    return page


def _check(path: str, form: NormalForm, bank: Bank) -> None:
    if path not in bank.targets:
        raise NoRoomError(
            f"{path}: the adapter changes it, and the bank has no room there; it has at "
            f"{', '.join(paths.nearest(path, bank.targets))}. Make the bank with this target."
        )
    target = bank.targets[path]
    most = bank.widest * bank.page_size
    if form.rank > most:
        raise NoRoomError(
            f"{path}: the adapter's factors are of rank {form.rank}, and the bank's widest adapter "
            f"is of rank {most}. Make the bank with widest={form.rank}."
        )
    pairs = {"a": target.a, "b": target.b, "pre": target.pre, "post": target.post}
    for name, room in pairs.items():
        given = getattr(form, name)
        if given is None:
            continue
        if room is None:
            side = "inputs" if name == "pre" else "outputs"
            raise NoRoomError(
                f"{path}: the adapter scales {side}, and the bank has no room for that there. Make "
                f"the bank with {name}={path!r}, or a rule that matches it."
            )
        stack = room.shape[: room.ndim - (3 if name in "ab" else 2)]
        expected = (*stack, room.shape[-1])
        found = (*given.shape[: len(stack)], given.shape[-1])
        if found != expected:
            raise ValueError(
                f"{path}: the adapter was made for another base: its {name} is {found} over layers "
                f"and features, the bank has {expected}."
            )


def _require_place(bank: Bank, place: Place, count: int) -> None:
    if len(place.pages) != count:
        raise ValueError(
            f"an adapter of {count} pages has no place in {len(place.pages)} pages: {place}."
        )
    inside = all(0 <= page < bank.pages for page in place.pages) and 0 <= place.slot < bank.slots
    if not inside or len({*place.pages}) != count:
        raise ValueError(
            f"{place} is no place in a bank of {bank.pages} pages and {bank.slots} slots."
        )
