"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), and rsLoRA's scaling."""

import dataclasses
import math
from typing import Any, Literal, Self, cast

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lora_jax.layouts import Layout
from lora_jax.methods.base import Additive, AnyWeight, Method
from lora_jax.weights import NARROW, embed, linear, vary


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """`y = x @ w + scale * dropout(x) @ a @ b` with `b = 0` at the start.

    Attributes:
      rank: r, the inner dimension of `a [d_in, r]` and `b [r, d_out]`.
      alpha: the numerator of the scale.
      scaling: "lora" for `alpha / r` (section 4.1 of the paper), "rslora" for `alpha / sqrt(r)`
        (Kalajdzievski 2023, arXiv:2312.03732).
      dropout: the rate at which entries of the adapter's input are zeroed while a `dropout_key` is
        bound; what remains is divided by `1 - dropout`.
      init: how `a` is drawn: "kaiming" is uniform on +-1/sqrt(d_in), as PEFT draws it; "gaussian"
        has standard deviation `1 / r`.

    Raises:
      ValueError: for a rank below 1 (None is the method that adapts nothing), an alpha that is not
        positive, a dropout outside [0, 1), an unknown scaling or init.
    """

    rank: int = 8
    alpha: float = 16.0
    scaling: Literal["lora", "rslora"] = "lora"
    dropout: float = 0.0
    init: Literal["kaiming", "gaussian"] = "kaiming"

    def __post_init__(self):
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(
                f"LoRA(rank={self.rank!r}): a rank is an integer of at least 1. To leave a target "
                "unadapted, map it to None."
            )
        if not self.alpha > 0:
            raise ValueError(f"LoRA(alpha={self.alpha!r}): alpha must be positive.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA(dropout={self.dropout!r}): the rate must lie in [0, 1).")
        _one_of("scaling", self.scaling, ("lora", "rslora"))
        _one_of("init", self.init, ("kaiming", "gaussian"))

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank if self.scaling == "lora" else math.sqrt(self.rank))

    def fresh(self, weight: AnyWeight, *, layout: Layout, key: jax.Array) -> "LowRank":
        stack, d_in, d_out = layout.split(weight.shape)
        if self.rank > min(math.prod(d_in), math.prod(d_out)):
            raise ValueError(
                f"LoRA(rank={self.rank}) exceeds the smaller side of a {math.prod(d_in)} x "
                f"{math.prod(d_out)} matrix. Give that target a smaller rank, "
                "{target: LoRA(rank=...)}, or use Full."
            )

        def draw(layer_key):
            shape = (*d_in, self.rank)
            if self.init == "gaussian":
                return jax.random.normal(layer_key, shape, jnp.float32) / self.rank
            bound = 1 / math.sqrt(math.prod(d_in))
            return jax.random.uniform(layer_key, shape, jnp.float32, -bound, bound)

        for _ in stack:
            draw = jax.vmap(draw)
        return LowRank(
            a=draw(key),
            b=jnp.zeros((*stack, self.rank, *d_out), jnp.float32),
            scale=jnp.full(stack, self.scale, jnp.float32),
            dropout=self.dropout,
            layout=layout,
        )


@flax.struct.dataclass
class LowRank(Additive):
    """`scale * a @ b`: `a [stack..., contracted..., r]`, `b [stack..., r, output...]`, float32.

    Padding both factors with zeros to a larger rank changes nothing, then or later: the gradient
    of each padded factor is a product with the other's zeros.
    """

    a: jax.Array
    b: jax.Array
    scale: jax.Array
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)
    layout: Layout = flax.struct.field(pytree_node=False, default=Layout())

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    @property
    def stack_ndim(self) -> int:
        return jnp.ndim(self.scale)

    def linear(self, x: jax.Array, base: AnyWeight, dropout_key: jax.Array | None) -> jax.Array:
        x_drop = x if dropout_key is None else drop(x, self.dropout, dropout_key)
        inner = linear(x_drop, self.a.astype(x.dtype)) * self.scale.astype(x.dtype)
        inner = checkpoint_name(inner, NARROW)
        return linear(x, base) + widen(inner, self.b.astype(x.dtype))

    def embed(self, tokens: jax.Array, base: AnyWeight) -> jax.Array:
        rows = embed(tokens, base)
        inner = embed(tokens, self.a).astype(rows.dtype) * self.scale.astype(rows.dtype)
        return rows + linear(inner, self.b.astype(rows.dtype))

    def transposed(self) -> "LowRank":
        return dataclasses.replace(
            self, a=jnp.swapaxes(self.b, -1, -2), b=jnp.swapaxes(self.a, -1, -2)
        )

    def as_matrix(self) -> "LowRank":
        stack = self.a.shape[: self.stack_ndim]
        return dataclasses.replace(
            self,
            a=self.a.reshape(*stack, -1, self.rank),
            b=self.b.reshape(*stack, self.rank, -1),
            layout=Layout(),
        )

    def partition(self, spec: PartitionSpec) -> "LowRank":
        *stack, d_in, d_out = spec
        parts: Any = self._partitioned(PartitionSpec(*stack))
        a, b = PartitionSpec(*stack, d_in, None), PartitionSpec(*stack, None, d_out)
        return dataclasses.replace(parts, a=a, b=b)

    def update(self, shape: tuple[int, ...]) -> jax.Array:
        matrix = self.as_matrix()
        with jax.default_matmul_precision("highest"):
            product = jnp.matmul(matrix.a, matrix.b) * self.scale[..., None, None]
        return self.layout.from_matrix(product, shape)

    def trainable(self) -> Self:
        return dataclasses.replace(cast(Any, self), a=True, b=True, scale=False)

    def check(self, path: str, base: AnyWeight) -> None:
        stack = self.stack_ndim
        ours = self.layout.joined(
            self.a.shape[:stack], self.a.shape[stack:-1], self.b.shape[stack + 1 :]
        )
        if ours != tuple(base.shape):
            raise ValueError(
                f"{path}: the delta was made for a weight of shape {ours}, the base has "
                f"{tuple(base.shape)}. Bind the delta to the base that it was made for."
            )

    def padded(self, like: "LowRank") -> "LowRank":
        missing = like.rank - self.rank
        grow_b = [(0, 0)] * self.b.ndim
        grow_b[self.stack_ndim] = (0, missing)
        return dataclasses.replace(
            self,
            a=jnp.pad(self.a, [(0, 0)] * (self.a.ndim - 1) + [(0, missing)]),
            b=jnp.pad(self.b, grow_b),
        )

    def absent(self) -> "LowRank":
        return jax.tree.map(jnp.zeros_like, self)


def widen(inner: jax.Array, b: jax.Array) -> jax.Array:
    """`inner @ b` for a narrow `inner [..., r]`, with a gradient of `b` that keeps `dy` as it lies.

    JAX's own rule puts the cotangent `dy [..., d_out]` first in the product that makes `db`, and
    XLA's CPU backend then copies it into its transpose: an eighth of a whole training step.
    """
    return _widen(vary(inner, like=b), vary(b, like=inner))


@jax.custom_vjp
def _widen(inner, b):
    return jnp.matmul(inner, b)


def _widen_forward(inner, b):
    return jnp.matmul(inner, b), (inner, b)


def _widen_backward(saved, dy):
    inner, b = saved
    rows = tuple(range(inner.ndim - 1))
    db = jax.lax.dot_general(inner, dy, ((rows, rows), ((), ())))
    return jax.lax.dot_general(dy, b, (((dy.ndim - 1,), (1,)), ((), ()))), db


_widen.defvjp(_widen_forward, _widen_backward)


def drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """`x` with entries zeroed at `rate` and the rest divided by `1 - rate`."""
    if rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def _one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"LoRA({field}={value!r}): expected one of {', '.join(allowed)}.")
