"""A bank of adapters on the device, in pages of ranks: a pytree, and pure updates of it.

At each target a page holds p ranks of one adapter, and an adapter of rank r takes ceil(r / p)
pages, the same ones at all of its targets: zeros where it does not adapt one. Vectors that scale
inputs or outputs have one entry a slot. The host knows which pages and slots are free: see `pool`.

Dimension key: P pages, p ranks of a page, S slots, B rows of a batch, w pages of a row.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax import paths, schema
from lora_jax.layouts import Layout
from lora_jax.methods import LoRA
from lora_jax.schema import leaf, static
from lora_jax.targets import Targets, as_rules, match_rules
from lora_jax.weights import PyTree, is_weight


@flax.struct.dataclass
class Target:
    """The bank's arrays at one weight, as its matrix.

    Attributes:
      a, b: `[stack..., P, p, d_in]` and `[stack..., P, p, d_out]`.
      pre, post: float32 `[stack..., S, d_in]` and `[stack..., S, d_out]`; None without room.
    """

    a: jax.Array = leaf("stack page rank in")
    b: jax.Array = leaf("stack page rank out")
    pre: jax.Array | None = leaf("stack slot in")
    post: jax.Array | None = leaf("stack slot out")
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


@flax.struct.dataclass
class Rows:
    """The adapter of each row of a batch: `pages [B, w]` and `slots [B]`, int32; -1 is none."""

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
      page_size: p; a multiple of 8 where a TPU or Hopper kernel is to run.
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
        factor_dtype = dtype or weight.dtype
        return Target(
            a=jnp.zeros((*stack, pages, page_size, math.prod(d_in)), factor_dtype),
            b=jnp.zeros((*stack, pages, page_size, math.prod(d_out)), factor_dtype),
            pre=ones(*stack, slots, math.prod(d_in)) if path in paths_of["pre"] else None,
            post=ones(*stack, slots, math.prod(d_out)) if path in paths_of["post"] else None,
            layout=layout,
        )

    return Bank(
        targets={path: target(path) for path in paths_of["targets"]},
        widest=-(-widest // page_size),
        slots=slots,
    )


def shardings(mesh: Mesh, bank: Bank, specs: Mapping[str, PartitionSpec]) -> Bank:
    """A tree like `bank` with the sharding of each array where the base has `specs`, by path: `a`
    follows the contracted axis of a weight, `b` its output axis, and pages and slots are
    replicated."""

    def of_target(path: str, target: Target) -> Target:
        stack, d_in, d_out = target.layout.split(tuple(specs[path]))
        tree = schema.sharding_specs(target, stack, d_in[:1], d_out[:1])
        return jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            tree,
            is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
        )

    targets = {path: of_target(path, target) for path, target in bank.targets.items()}
    return dataclasses.replace(bank, targets=targets)


def rows_of(places: Sequence[Place | None], *, width: int | None = None) -> Rows:
    """The pages and slots of rows whose adapters are at these places; None is the base.

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
