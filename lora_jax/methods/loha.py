"""LoHa: the Hadamard product of two low-rank updates (Hyeon-Woo et al. 2022, arXiv:2108.06098; for
adapters Yeh et al. 2024, arXiv:2309.14859)."""

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lora_jax.layouts import Layout
from lora_jax.methods.method import Method, Shape
from lora_jax.nodes import Additive, DeltaNode
from lora_jax.products import Product
from lora_jax.schema import leaf, static


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHa(Method):
    """`y = x @ w + scale * x @ ((a1 @ b1) * (a2 @ b2))`, `scale = alpha / rank`.

    The entrywise product has rank up to `rank ** 2`, with the parameters of two LoRAs. It is never
    built: it equals `a @ b` with `a[i, rs] = a1[i, r] a2[i, s]` and `b[rs, o] = b1[r, o] b2[s, o]`,
    so that the branch costs what LoRA of rank `rank ** 2` costs.

    Attributes:
      rank: r of both pairs.
      alpha: the numerator of the scale.
      dropout: the rate at which entries of the branch's input are zeroed, as in `LoRA`.

    Init: `a1` is uniform on +-1/sqrt(d_in), `b1` and `b2` on +-1/sqrt(rank), and `a2` is zero,
    as in PEFT (whose `w_a` is our b, and `w_b` our a, transposed).

    Raises:
      ValueError: for a rank below 1, an alpha that is not positive, a dropout outside [0, 1).
    """

    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0

    def __post_init__(self):
        self._require_count("rank", "a rank is an integer of at least 1.")
        self._require("alpha", self.alpha > 0, "expected a positive alpha.")
        self._require_rate("dropout")

    def init_layer(self, d_in: Shape, d_out: Shape, layout: Layout, key: jax.Array) -> DeltaNode:
        keys = jax.random.split(key, 3)

        def uniform(key, *shape, fan_in):
            bound = 1 / math.sqrt(fan_in)
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        a1 = uniform(keys[0], *d_in, self.rank, fan_in=math.prod(d_in))
        b1, b2 = (uniform(key, self.rank, *d_out, fan_in=self.rank) for key in keys[1:])
        return LoHaNode(
            a1=a1,
            b1=b1,
            a2=jnp.zeros_like(a1),
            b2=b2,
            scale=jnp.float32(self.alpha / self.rank),
            dropout=self.dropout,
            layout=layout,
        )


@flax.struct.dataclass
class LoHaNode(Additive):
    """`scale * (a1 @ b1) * (a2 @ b2)`, all float32."""

    own_axes = ("rank",)
    padded_axes = ("rank",)
    split_axes = ("in", "out")

    a1: jax.Array = leaf("stack in rank", mirror="b1")
    b1: jax.Array = leaf("stack rank out", mirror="a1")
    a2: jax.Array = leaf("stack in rank", absent=0, mirror="b2")
    b2: jax.Array = leaf("stack rank out", mirror="a2")
    scale: jax.Array = leaf("stack", trained=False)
    dropout: float = static(0.0)
    layout: Layout = static(Layout())

    def branch(self, x: Any, product: Product) -> jax.Array:
        a, b = self._one_pair()
        h = product.narrow(x, a)
        return product.widen(h * self.scale.astype(h.dtype), b)

    def factors(self) -> tuple[jax.Array, jax.Array]:
        a, b = self._one_pair()
        return a.astype(jnp.float32), b.astype(jnp.float32) * self.scale.astype(jnp.float32)

    def _one_pair(self) -> tuple[jax.Array, jax.Array]:
        """`a [d_in, r * r]` and `b [r * r, d_out]` of one LoRA, but for the scale."""
        a = (self.a1[:, :, None] * self.a2[:, None, :]).reshape(self.a1.shape[0], -1)
        b = (self.b1[:, None, :] * self.b2[None, :, :]).reshape(-1, self.b1.shape[-1])
        return a, b
