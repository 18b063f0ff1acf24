"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353)."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.layouts import Layout
from lora_jax.methods.decompositions import each_layer
from lora_jax.methods.lora import LoRA, LowRank
from lora_jax.nodes import DeltaNode
from lora_jax.products import AnyWeight, Product, Rows, scaled
from lora_jax.schema import leaf
from lora_jax.weights import UNSCALED, as_matrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """`y = c * (x @ V)` with `V = w + scale * a @ b` and `c = m / ||V||`, column by column.

    The magnitude `m` trains and is initialised as `||V||`; the norm is treated as a constant
    (section 4.3 of the paper). It is computed without V, by expanding it:
    `||V_j||^2 = ||w_j||^2 + 2 s (a^T w)_j . b_j + s^2 b_j^T (a^T a) b_j`, where the first term is
    stored and the second costs what r more tokens cost.

    With dropout, `y = x @ w + (c - 1) * (x_d @ w) + c * scale * x_d @ a @ b` for the dropped input
    `x_d`, as PEFT has it: a second product with the base.

    Attributes are those of `LoRA`.

    Raises:
      ValueError: as `LoRA`, and for an init that changes the base.
    """

    def __post_init__(self):
        super().__post_init__()
        self._require("init", not self._decomposes, "expected one of kaiming, gaussian, zero_a.")

    @property
    def reads_values(self) -> bool:
        return True

    def init_node(
        self, path: str, weight: AnyWeight, *, layout: Layout, key: jax.Array
    ) -> DeltaNode:
        del path
        square = each_layer(lambda w: jnp.sum(w**2, axis=-2), as_matrix(weight, layout))
        stack, _, d_out = layout.split(weight.shape)
        square = square.reshape(*stack, *d_out)
        low_rank = self.leaves(weight, layout=layout, key=key)
        return DoRANode(**low_rank, magnitude=jnp.sqrt(square), base_square=square)


@flax.struct.dataclass
class DoRANode(LowRank):
    """Columns of `V = w + scale * a @ b`, each rescaled to a trained length.

    Attributes:
      magnitude: m, the length of each column.
      base_square: the squared length of each column of the base.
    """

    split_axes = ()
    part_axes = ("out",)
    takes_experts = False

    magnitude: jax.Array = leaf("stack out", kw_only=True)
    base_square: jax.Array = leaf("stack out", trained=False, kw_only=True)

    def apply(
        self, product: Product, x: Any, base: AnyWeight, dropout_key: jax.Array | None
    ) -> jax.Array:
        """With dropout the frozen weight is applied a second time, to the dropped input."""
        y, x_drop = product(x, base), product.dropped(x, self.dropout, dropout_key)
        factor = self.factor(product.left(self.a.astype(y.dtype), base))
        if x_drop is x:
            return scaled(checkpoint_name(y + self.branch(x, product), UNSCALED), factor)
        wide = checkpoint_name(product(x_drop, base), UNSCALED)
        return y + scaled(wide, factor - 1) + scaled(self.branch(x_drop, product), factor)

    def factors(self) -> None:
        """Merging rescales the weight's own columns too."""
        return None

    def unmerge(self, merged: jax.Array) -> jax.Array:
        """Solves for the length n of each column of V: `||n d - u||^2 = ||w||^2`, with d the merged
        column over its magnitude and u its update. A column whose update is longer than itself is
        not determined, and becomes NaN."""

        def solve(node: DoRANode, matrix: jax.Array) -> jax.Array:
            update = node.branch(1.0, Rows())
            direction = matrix / node.magnitude[None]
            along = jnp.sum(direction * update, axis=-2)
            rest = node.base_square - jnp.sum(update**2, axis=-2)
            length = along + jnp.sqrt(along**2 + jnp.where(rest >= 0, rest, jnp.nan))
            return length[None] * direction - update

        return self._each_matrix(solve, merged).astype(merged.dtype)

    def factor(self, left: jax.Array) -> jax.Array:
        """`m / ||V||`, `[d_out]`, for `left = a^T w [r, d_out]`."""
        a, b, scale = self.a, self.b, self.scale
        with jax.default_matmul_precision("highest"):
            squared = jnp.matmul(jnp.matmul(a.T, a), b) * scale**2
        cross = 2 * scale * left.astype(jnp.float32) + squared
        square = self.base_square + jnp.sum(b * cross, axis=-2)
        norm = jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))  # a column may be zero
        factor = self.magnitude / jax.lax.stop_gradient(norm)
        # In a stack, a node of scale 0 is a target that an adapter does not have.
        return jnp.where(scale == 0, jnp.ones_like(factor), factor)
