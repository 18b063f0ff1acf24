"""Bound weights whose batch rows use adapters of a bank.

Dimension key: B rows, P pages, p ranks of a page, R = w p, S slots.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.kernels.grouped_lora import gathering, grouped_lora
from lora_jax.layouts import Layout
from lora_jax.products import scaled
from lora_jax.schema import static
from lora_jax.serving.bank import Bank, Rows, Target
from lora_jax.weights import PyTree, Shared, Weight, as_matrix, cast, embed, is_weight, linear
from lora_jax.weights import transpose as transposed


def bind(base: PyTree, bank: Bank, rows: Rows) -> PyTree:
    """The weights that a model runs with: a tree shaped as `base`, adapted row by row.

    Axis 0 of every activation that meets an adapted weight must be the batch. Nothing is computed
    here, and the cost of a product follows the rows and their pages, not the bank. A row of slot -1
    without pages uses the base.

    Raises:
      ValueError: where the bank has a target that the base lacks or has in another shape; for rows
        that are not `pages [B, w]` and `slots [B]`.
    """
    if rows.pages.ndim != 2 or rows.slots.shape != rows.pages.shape[:1]:
        raise ValueError(
            f"rows of pages {rows.pages.shape} and slots {rows.slots.shape}: expected [B, w] and "
            "[B]; rows_of makes them."
        )
    flat = {
        path: jax.lax.stop_gradient(leaf) if paths.is_array(leaf) else leaf
        for path, leaf in paths.flatten(base, is_leaf=is_weight).items()
    }
    for path, target in bank.targets.items():
        if path not in flat:
            raise ValueError(
                f"the bank has a target {path!r}, which the base lacks; the nearest paths are "
                f"{', '.join(paths.nearest(path, flat))}. Was it made for another base?"
            )
        flat[path] = _served(path, flat[path], target, rows)
    return jax.tree.unflatten(jax.tree.structure(base, is_leaf=is_weight), flat.values())


def _served(path: str, weight: Any, target: Target, rows: Rows) -> "Served":
    layout = target.layout
    stack, d_in, d_out = layout.split(weight.shape)
    made_for = *target.a.shape[:-3], target.a.shape[-1], target.b.shape[-1]
    found = *stack, int(np.prod(d_in)), int(np.prod(d_out))
    if made_for != found:
        raise ValueError(
            f"{path}: the bank was made for a matrix of {made_for}, the base has {found}. Bind it "
            "to the base that it was made for."
        )

    def over_layers(array: jax.Array | None, own: int) -> Any:
        """One axis for the stacked layers and the pages or slots: `[layers * P, ...]`."""
        if array is None:
            return None
        return Shared(array.reshape(-1, *array.shape[array.ndim - own + 1 :]))

    return Served(
        base=weight,
        a=over_layers(target.a, 3),
        b=over_layers(target.b, 3),
        pre=over_layers(target.pre, 2),
        post=over_layers(target.post, 2),
        layer=jnp.arange(int(np.prod(stack)), dtype=jnp.int32).reshape(stack),
        rows=Shared(rows),
        pages=target.a.shape[-3],
        slots=_slots(target),
        layout=layout,
    )


def _slots(target: Target) -> int:
    vectors = [vector for vector in (target.pre, target.post) if vector is not None]
    return vectors[0].shape[-2] if vectors else 0


@flax.struct.dataclass
class Served(Weight):
    """A frozen weight beside the pages of its rows' adapters.

    A scan over layers slices the weight and `layer`, but not the bank, since slicing it would copy
    a layer's part at every step.

    Attributes:
      base: the frozen weight.
      a, b: `[layers * P, p, d_in]` and `[layers * P, p, d_out]`, for all layers.
      pre, post: `[layers * S, d_in]` and `[layers * S, d_out]`, or None.
      layer: `[stack...]`, which layer this is.
      rows: what each row uses.
      pages, slots: P and S.
    """

    base: jax.Array | Weight
    a: Shared
    b: Shared
    pre: Shared | None
    post: Shared | None
    layer: jax.Array
    rows: Shared
    pages: int = static()
    slots: int = static()
    layout: Layout = static(Layout())

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def T(self) -> "Served":  # noqa: N802
        if self.pre is not None or self.post is not None:
            raise ValueError(
                "a tied output head reads its embedding transposed, and the bank has room for "
                "scales of inputs or outputs there: make it without pre and post for the embedding."
            )
        return dataclasses.replace(self, base=transposed(self.base), a=self.b, b=self.a)

    def as_matrix(self, layout: Layout) -> "Served":
        return dataclasses.replace(self, base=as_matrix(self.base, layout), layout=Layout())

    def cast(self, dtype: Any) -> "Served":
        return dataclasses.replace(self, base=cast(self.base, dtype))

    def linear(self, x: jax.Array) -> jax.Array:
        pages = self._pages(x)
        x = self._scaled(x, self.pre)
        tokens = x.reshape(-1, x.shape[-1])
        branch = grouped_lora(tokens, self.a.value, self.b.value, pages)
        y = linear(x, self.base)
        return self._scaled(y + branch.astype(y.dtype).reshape(y.shape), self.post)

    def embed(self, tokens: jax.Array) -> jax.Array:
        if self.pre is not None:
            raise ValueError("an embedding is looked up by index: there is no input to scale.")
        pages_Bw, y = self._pages(tokens), embed(tokens, self.base)
        a_PpV, b_PpD = self.a.value, self.b.value
        B = len(pages_Bw)
        ids_BT = tokens.reshape(B, -1)
        a_PpV, pages_Bw = gathering.where_it_is(a_PpV, pages_Bw)
        page_BTw = jnp.where(pages_Bw < 0, len(a_PpV), pages_Bw)[:, None]
        picked = a_PpV.at[page_BTw, :, ids_BT[..., None]].get(mode="fill", fill_value=0)
        h_BTR = picked.reshape(B, ids_BT.shape[1], -1).astype(jnp.float32)
        b_BRD = gathering.gathered(b_PpD, pages_Bw).astype(jnp.float32)
        branch = jnp.einsum("btr,brd->btd", h_BTR, b_BRD)
        return self._scaled(y + branch.astype(y.dtype).reshape(y.shape), self.post)

    def dense(self) -> jax.Array:
        raise ValueError(
            "a weight whose batch rows use different adapters has no single dense form: bind one "
            "adapter with lora_jax.bind."
        )

    def _pages(self, x: jax.Array) -> jax.Array:
        """The rows' pages among those of all layers."""
        pages = self.rows.value.pages
        if x.ndim == 0 or x.shape[0] != len(pages):
            raise ValueError(
                f"an activation of shape {x.shape} meets a weight whose rows use {len(pages)} "
                "adapters: its first axis must be the batch."
            )
        return jnp.where(pages < 0, -1, pages + self.layer * self.pages)

    def _scaled(self, x: jax.Array, vectors: Shared | None) -> jax.Array:
        if vectors is None:
            return x
        slots = self.rows.value.slots
        place = jnp.where(slots < 0, len(vectors.value), slots + self.layer * self.slots)
        factor = vectors.value.at[place].get(mode="fill", fill_value=1)
        return scaled(x, factor.reshape(len(slots), *[1] * (x.ndim - 2), -1))
