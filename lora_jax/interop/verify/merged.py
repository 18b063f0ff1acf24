"""The same adapter merged, weight by weight, and how far other logits are from the bound ones."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.adapted import Adapted
from lora_jax.interop.forward import AnyForward, in_float32
from lora_jax.interop.verify.report import Form
from lora_jax.layouts import Layout
from lora_jax.transform import Delta, bind, delta_nodes
from lora_jax.weights import PyTree, Transposed, Weight, dense, is_weight


@flax.struct.dataclass
class Merged(Weight):
    """An adapted weight that is merged where an activation meets it, one layer at a time: it
    computes what the merged tree would, without that tree.

    Attributes:
      adapted: the weight to merge, in the dtype of its base.
      seen_as: the dtype that the model sees.
      to_codes: whether the sum is quantised again, in its base's format.
    """

    adapted: Adapted
    seen_as: Any = flax.struct.field(pytree_node=False)
    to_codes: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.adapted.shape

    @property
    def dtype(self) -> Any:
        return self.seen_as

    @property
    def layout(self) -> Layout:
        return self.adapted.layout

    @property
    def T(self) -> Transposed:  # noqa: N802
        return Transposed(self)

    def as_matrix(self, layout: Layout) -> "Merged":
        return dataclasses.replace(self, adapted=self.adapted.as_matrix(layout))

    def dense(self) -> jax.Array:
        merged = self.adapted.dense()
        base = self.adapted.base
        if self.to_codes and isinstance(base, Weight):
            return dense(base.requantized(merged))
        return merged

    def linear(self, x: jax.Array) -> jax.Array:
        return _product(x, self.dense())

    def linear_transposed(self, x: jax.Array) -> jax.Array:
        return _product(x, jnp.swapaxes(self.dense(), -1, -2))

    def embed(self, tokens: jax.Array) -> jax.Array:
        return jnp.take(self.dense(), tokens, axis=0).astype(self.seen_as)


def merged_weights(
    forward: AnyForward, base: PyTree, delta: Delta, *, wide: bool, requantized: bool = False
) -> PyTree:
    """The weights of the merged tree, each merged when an activation meets it.

    Args:
      wide: whether the sum stays in float32, or is rounded to the base's dtype.
      requantized: whether quantised weights are quantised again, in their format.

    Raises:
      ValueError: for a method without a merged form.
    """
    shown = paths.flatten(forward.prepared(base), is_leaf=is_weight)
    bound = bind(in_float32(base) if wide else base, delta)
    ready = paths.flatten(forward.prepared(bound), is_leaf=is_weight)
    nodes = delta_nodes(delta)

    def seen(path: str, leaf: Any) -> Any:
        if isinstance(leaf, Adapted):
            jax.eval_shape(dense, leaf)  # raises where there is no merged form
            return Merged(leaf, seen_as=shown[path].dtype, to_codes=requantized)
        if path in shown and path not in nodes:
            return shown[path]
        leaf = ready[path]
        return leaf.astype(shown[path].dtype) if _differs(leaf, shown.get(path)) else leaf

    leaves = [seen(path, leaf) for path, leaf in paths.flatten(bound, is_leaf=is_weight).items()]
    return jax.tree.unflatten(jax.tree.structure(bound, is_leaf=is_weight), leaves)


def held_to(bound: np.ndarray, base: np.ndarray, name: str, logits: np.ndarray) -> Form:
    """How far the logits `[T, V]` of another form are from the bound ones."""
    bound, base, logits = (np.asarray(rows, np.float64) for rows in (bound, base, logits))
    effect, off = np.linalg.norm(bound - base), np.linalg.norm(logits - bound)
    return Form(
        name=name,
        max_difference=float(np.abs(logits - bound).max()),
        kl=kl_divergence(bound, logits),
        of_effect=float(off / effect) if effect else None,
    )


def kl_divergence(logits: np.ndarray, others: np.ndarray) -> float:
    """The mean over positions of `sum p log(p / q)`, in nats; p of `logits`, q of `others`."""

    def log_p(rows):
        rows = np.asarray(rows, np.float64)
        rows = rows - rows.max(axis=-1, keepdims=True)
        return rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))

    p, q = log_p(logits), log_p(others)
    return float(max(0.0, (np.exp(p) * (p - q)).sum(axis=-1).mean()))


def _differs(leaf: Any, like: Any) -> bool:
    return like is not None and not is_weight(leaf) and leaf.dtype != like.dtype


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    dtype = w.dtype if w.dtype.itemsize > x.dtype.itemsize else x.dtype
    return jnp.matmul(x.astype(dtype), w.astype(dtype)).astype(x.dtype)
