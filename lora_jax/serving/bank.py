"""A bank of adapters on the device, in pages of ranks: a pytree, and pure updates of it.

At each target a page holds p ranks of one adapter, and an adapter of rank r takes ceil(r / p)
pages, the same ones at all of its targets: zeros where it does not adapt one. What scales inputs or
outputs has one entry a slot. Which pages and slots are free is the host's to know: see `pool`.

Dimension key: P pages, p ranks of a page, S slots, B rows of a batch, w pages of a row.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.layouts import Layout
from lora_jax.methods import LoRA
from lora_jax.schema import static
from lora_jax.serving.normal_form import NormalForm
from lora_jax.targets import Targets, as_rules, match_rules
from lora_jax.weights import PyTree, is_weight


@flax.struct.dataclass
class Target:
    """The bank's part at one weight, as its matrix.

    Attributes:
      a, b: `[stack..., P, p, d_in]` and `[stack..., P, p, d_out]`.
      pre, post: float32 `[stack..., S, d_in]` and `[stack..., S, d_out]`; None without room.
    """

    a: jax.Array
    b: jax.Array
    pre: jax.Array | None
    post: jax.Array | None
    layout: Layout = static()


@flax.struct.dataclass
class Bank:
    """Pages and slots at each target, by path.

    Attributes:
      widest: the most pages of one adapter.
      slots: how many adapters have a place.
    """

    targets: dict[str, Target]
    widest: int = static()
    slots: int = static()

    @property
    def pages(self) -> int:
        return next(iter(self.targets.values())).a.shape[-3]

    @property
    def page_size(self) -> int:
        return next(iter(self.targets.values())).a.shape[-2]

    @property
    def nbytes(self) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


class Place(NamedTuple):
    """Where one adapter is in the bank."""

    pages: tuple[int, ...]
    slot: int


class Packed(NamedTuple):
    """An adapter on the host as a bank takes it: for each page, and once, by path."""

    pages: tuple[Mapping[str, tuple[np.ndarray, np.ndarray]], ...]
    vectors: Mapping[str, tuple[np.ndarray | None, np.ndarray | None]]


@flax.struct.dataclass
class Rows:
    """What each row of a batch uses: `pages [B, w]` and `slots [B]`, int32; -1 is none."""

    pages: jax.Array
    slots: jax.Array


def make_bank(
    params: PyTree,
    *,
    pages: int,
    slots: int,
    targets: Targets = "all-linear",
    page_size: int = 8,
    widest: int = 64,
    dtype: Any = None,
    pre: Targets | None = None,
    post: Targets | None = None,
    layouts: Mapping[str, Layout] | None = None,
) -> Bank:
    """An empty bank for adapters of one base.

    Args:
      params: the base, or its shapes.
      pages: how many pages all adapters share; with pages of 8 ranks, 2 for one of rank 16.
      slots: how many adapters it holds at most.
      targets: as of `lora_transform`; name embeddings and output head to make room there too, as
        in `("all-linear", "embed", "lm_head")`. A tied head is the table's transpose.
      page_size: p; a multiple of 8 where the TPU kernel is to run.
      widest: the highest rank of an adapter, PiSSA's and OLoRA's twice their own.
      dtype: of the factors; None for that of each weight.
      pre, post: the targets at which inputs (IA3) and outputs (IA3, DoRA) may be scaled, as of
        `lora_transform`; None for no room.
      layouts: as of `lora_transform`.

    Raises:
      ValueError: for a target that matches nothing, or room for scales where there is no target;
        for a size below 1.
    """
    sizes = {"pages": pages, "slots": slots, "page_size": page_size, "widest": widest}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"make_bank({name}={size}): expected at least 1.")
    flat = paths.flatten(params, is_leaf=is_weight)
    layouts = dict(layouts or {})

    def chosen(rules: Targets | None) -> list[str]:
        if rules is None:
            return []
        matches = match_rules(flat, as_rules(LoRA(rank=1), rules), layouts)
        return [match.path for match in matches]

    paths_of = {"targets": chosen(targets), "pre": chosen(pre), "post": chosen(post)}
    for name in ("pre", "post"):
        if odd := [path for path in paths_of[name] if path not in paths_of["targets"]]:
            raise ValueError(
                f"make_bank({name}=...) names {odd[0]}, which is no target: add it to targets."
            )

    def ones(*shape: int) -> jax.Array:
        return jnp.ones(shape, jnp.float32)

    def target(path: str) -> Target:
        weight = flat[path]
        layout = layouts.get(path) or (weight.layout if is_weight(weight) else Layout())
        stack, d_in, d_out = layout.split(weight.shape)
        kind = dtype or weight.dtype
        return Target(
            a=jnp.zeros((*stack, pages, page_size, math.prod(d_in)), kind),
            b=jnp.zeros((*stack, pages, page_size, math.prod(d_out)), kind),
            pre=ones(*stack, slots, math.prod(d_in)) if path in paths_of["pre"] else None,
            post=ones(*stack, slots, math.prod(d_out)) if path in paths_of["post"] else None,
            layout=layout,
        )

    return Bank(
        targets={path: target(path) for path in paths_of["targets"]},
        widest=-(-widest // page_size),
        slots=slots,
    )


def pack(bank: Bank, forms: Mapping[str, NormalForm]) -> Packed:
    """The adapter in the bank's pages and dtype, on the host.

    Raises:
      ValueError: for a target, a rank or a scale that the bank has no room for, and for an adapter
        of another base.
    """
    for path, form in forms.items():
        _check(path, form, bank)
    p = bank.page_size
    count = max((-(-form.rank // p) for form in forms.values()), default=0)

    def page(number: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        ranks = slice(number * p, (number + 1) * p)
        return {
            path: tuple(
                _page(side[..., ranks, :], p, like.dtype)
                for side, like in zip((form.a, form.b), _factors(bank, path), strict=True)
            )
            for path, form in forms.items()
            if form.rank > number * p
        }

    vectors = {
        path: (form.pre, form.post)
        for path, form in forms.items()
        if form.pre is not None or form.post is not None
    }
    return Packed(tuple(page(number) for number in range(count)), vectors)


def put(bank: Bank, place: Place, adapter: Packed) -> Bank:
    """The bank with an adapter in these pages and this slot; what was there is gone.

    The given bank's memory is taken over: use the returned one alone. Two programs, one for a page
    and one for a slot, serve adapters of all ranks and targets.

    Raises:
      ValueError: for a place of another number of pages, or outside the bank.
    """
    _require_place(bank, place, len(adapter.pages))
    for number, factors in zip(place.pages, adapter.pages, strict=True):
        bank = _write_page(bank, np.int32(number), _all_targets(bank, factors))
    return _put_vectors(bank, place.slot, adapter.vectors)


def drop(bank: Bank, place: Place) -> Bank:
    """The bank with zeros in these pages and ones in this slot. Memory as with `put`.

    A place need not be dropped before something else is put there.
    """
    _require_place(bank, place, len(place.pages))
    for number in place.pages:
        bank = _write_page(bank, np.int32(number), _all_targets(bank, {}))
    return _put_vectors(bank, place.slot, {})


def rows_of(places: Sequence[Place | None], *, width: int | None = None) -> Rows:
    """What rows use whose adapters are at these places, None being the base.

    Args:
      width: w; None for the smallest power of two that holds them all.
    """
    most = max((len(place.pages) for place in places if place), default=0)
    width = width or 1 << max(most - 1, 0).bit_length()
    if most > width:
        raise ValueError(f"an adapter of {most} pages does not fit rows of {width}.")
    pages = np.full((len(places), width), -1, np.int32)
    slots = np.full(len(places), -1, np.int32)
    for row, place in enumerate(places):
        if place is not None:
            pages[row, : len(place.pages)], slots[row] = place.pages, place.slot
    return Rows(jnp.asarray(pages), jnp.asarray(slots))


@functools.partial(jax.jit, donate_argnums=0)
def _write_page(bank: Bank, number: jax.Array, factors: dict[str, tuple]) -> Bank:
    def write(target: Target, pair: tuple) -> Target:
        a, b = (
            jax.lax.dynamic_update_index_in_dim(into, new, number, into.ndim - 3)
            for into, new in zip((target.a, target.b), pair, strict=True)
        )
        return target.replace(a=a, b=b)

    written = {path: write(target, factors[path]) for path, target in bank.targets.items()}
    return bank.replace(targets=written)


@functools.partial(jax.jit, donate_argnums=0)
def _write_slot(bank: Bank, slot: jax.Array, vectors: dict[str, tuple]) -> Bank:
    def write(into: jax.Array | None, new: jax.Array | None):
        if into is None:
            return None
        return jax.lax.dynamic_update_index_in_dim(into, new, slot, into.ndim - 2)

    written = {}
    for path, target in bank.targets.items():
        pre, post = vectors[path]
        written[path] = target.replace(pre=write(target.pre, pre), post=write(target.post, post))
    return bank.replace(targets=written)


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


def _factors(bank: Bank, path: str) -> tuple[jax.Array, jax.Array]:
    return bank.targets[path].a, bank.targets[path].b


def _page(ranks: np.ndarray, size: int, dtype: Any) -> np.ndarray:
    """The ranks of one page, zeros behind the last."""
    page = np.zeros((*ranks.shape[:-2], size, ranks.shape[-1]), dtype)
    page[..., : ranks.shape[-2], :] = ranks
    return page


def _check(path: str, form: NormalForm, bank: Bank) -> None:
    if path not in bank.targets:
        raise ValueError(
            f"{path}: the adapter changes it, and the bank has no room there; it has at "
            f"{', '.join(paths.nearest(path, bank.targets))}. Make the bank with this target."
        )
    target = bank.targets[path]
    most = bank.widest * bank.page_size
    if form.rank > most:
        raise ValueError(
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
            raise ValueError(
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
