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
from lora_jax.methods.base import Additive, AnyWeight, DeltaNode, Method, require_shape
from lora_jax.methods.decompositions import STARTS, factors_of
from lora_jax.weights import NARROW, Weight, as_matrix, dense_float32, embed, linear, vary


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """`y = x @ w + scale * dropout(x) @ a @ b` with `b = 0` at the start.

    Attributes:
      rank: r, the inner dimension of `a [d_in, r]` and `b [r, d_out]`. A tuple gives each layer of
        a stacked weight its own: factors are padded with zeros to the largest, which is exact, and
        a layer of rank 0 stays as it is. See `allocate_ranks`.
      alpha: the numerator of the scale.
      scaling: "lora" for `alpha / r` (section 4.1 of the paper), "rslora" for `alpha / sqrt(r)`
        (Kalajdzievski 2023, arXiv:2312.03732).
      dropout: the rate at which entries of the adapter's input are zeroed while a `dropout_key` is
        bound; what remains is divided by `1 - dropout`.
      init: how `a` is drawn: "kaiming" is uniform on +-1/sqrt(d_in), as PEFT draws it; "gaussian"
        has standard deviation `1 / r`. "pissa", "pissa_niter_N" and "olora" take a and b from the
        weight itself, and the base that `lora_transform` returns is the rest: see
        `decompositions.factors_of`, and `as_plain_lora` for the way back. Of a quantised weight the
        rest is quantised again, and the model starts as close to the base as that error allows.
      train_a: False freezes `a` where it starts: LoRA-FA (Zhang et al. 2023, arXiv:2308.03303).
        No gradient of `a` is computed. The paper's correction of `b`'s gradient is `project_b`.

    Raises:
      ValueError: for a rank below 1 (None is the method that adapts nothing), an alpha that is not
        positive, a dropout outside [0, 1), an unknown scaling or init.
    """

    rank: int | tuple[int, ...] = 8
    alpha: float = 16.0
    scaling: Literal["lora", "rslora"] = "lora"
    dropout: float = 0.0
    init: str = "kaiming"
    train_a: bool = True

    def __post_init__(self):
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,)
        fits = all(isinstance(rank, int) and rank >= 0 for rank in ranks)
        if not fits or max(ranks, default=0) < 1:
            raise ValueError(
                f"{self._named('rank')}: a rank is an integer of at least 1, or a tuple of one for "
                "each stacked layer. To leave a target unadapted, map it to None."
            )
        if not self.alpha > 0:
            raise ValueError(f"{self._named('alpha')}: alpha must be positive.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{self._named('dropout')}: the rate must lie in [0, 1).")
        if self.scaling not in ("lora", "rslora"):
            raise ValueError(f"{self._named('scaling')}: expected one of lora, rslora.")
        if self.init not in ("kaiming", "gaussian") and not self._decomposes:
            raise ValueError(
                f"{self._named('init')}: expected one of kaiming, gaussian, pissa, pissa_niter_N, "
                "olora."
            )

    def fresh(self, weight: AnyWeight, *, layout: Layout, key: jax.Array) -> DeltaNode:
        return self.low_rank(weight, layout=layout, key=key)

    def corrected(self, weight: AnyWeight, node: DeltaNode) -> AnyWeight:
        """The weight without what the factors took from it, in its own format."""
        if not self._decomposes:
            return weight
        rest = dense_float32(weight) - cast(LowRank, node).update(weight.shape)
        if isinstance(weight, Weight):
            return weight.requantized(rest)
        return rest.astype(weight.dtype)

    def low_rank(self, weight: AnyWeight, *, layout: Layout, key: jax.Array) -> "LowRank":
        """The fresh pair of factors."""
        stack, d_in, d_out = layout.split(weight.shape)
        rank = self._widest(stack, math.prod(d_in), math.prod(d_out))
        ranks = jnp.asarray(self.rank, jnp.float32)  # a scalar, or one for each layer
        ranks = jnp.broadcast_to(ranks, stack)
        scale = self.alpha / (ranks if self.scaling == "lora" else jnp.sqrt(ranks))
        scale = jnp.where(ranks == 0, 0, scale)
        if self._decomposes:
            matrix = as_matrix(weight, layout)
            a, b = factors_of(self.init, matrix, rank, scale, key)
        else:
            a, b = self._drawn(stack, (math.prod(d_in), rank, math.prod(d_out)), ranks, key)
        if isinstance(self.rank, tuple):
            index = jnp.broadcast_to(jnp.arange(rank, dtype=jnp.float32), (*stack, rank))
            used = index < ranks[..., None]
            a, b = jnp.where(used[..., None, :], a, 0), jnp.where(used[..., None], b, 0)
        return LowRank(
            a=a.reshape(*stack, *d_in, rank),
            b=b.reshape(*stack, rank, *d_out),
            scale=scale,
            dropout=self.dropout,
            layout=layout,
            train_a=self.train_a,
        )

    def _drawn(self, stack, shape, ranks, key) -> tuple[jax.Array, jax.Array]:
        d_in, rank, d_out = shape

        def draw(layer_key, layer_rank):
            if self.init == "gaussian":
                a = jax.random.normal(layer_key, (d_in, rank), jnp.float32)
                return a / jnp.maximum(layer_rank, 1)
            bound = 1 / math.sqrt(d_in)
            return jax.random.uniform(layer_key, (d_in, rank), jnp.float32, -bound, bound)

        for _ in stack:
            draw = jax.vmap(draw)
        return draw(key, ranks), jnp.zeros((*stack, rank, d_out), jnp.float32)

    @property
    def _decomposes(self) -> bool:
        """Whether the factors are a part of the weight."""
        return bool(STARTS.fullmatch(self.init))

    def _widest(self, stack: tuple[int, ...], d_in: int, d_out: int) -> int:
        """The rank that the factors are padded to."""
        if isinstance(self.rank, tuple) and stack != (len(self.rank),):
            raise ValueError(
                f"{self._named('rank')} names {len(self.rank)} stacked layers, but the weight's "
                f"stack axes are {stack}. Give one rank, or one for each stacked layer."
            )
        rank = max(self.rank) if isinstance(self.rank, tuple) else self.rank
        if rank > min(d_in, d_out):
            raise ValueError(
                f"{type(self).__name__}(rank={rank}) exceeds the smaller side of a {d_in} x "
                f"{d_out} matrix. Give that target a smaller rank, "
                f"{{target: {type(self).__name__}(rank=...)}}, or use Full."
            )
        return rank

    def _named(self, field: str) -> str:
        return f"{type(self).__name__}({field}={getattr(self, field)!r})"


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
    train_a: bool = flax.struct.field(pytree_node=False, default=True)

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    @property
    def stack_ndim(self) -> int:
        return jnp.ndim(self.scale)

    def linear(self, x: jax.Array, base: AnyWeight, dropout_key: jax.Array | None) -> jax.Array:
        x_drop = x if dropout_key is None else drop(x, self.dropout, dropout_key)
        return linear(x, base) + self.branch(x_drop)

    def branch(self, x: jax.Array) -> jax.Array:
        """`scale * x @ a @ b`: what is added to the base's output."""
        inner = linear(x, self.a.astype(x.dtype)) * self.scale.astype(x.dtype)
        return widen(checkpoint_name(inner, NARROW), self.b.astype(x.dtype))

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

    def placement(self, spec: PartitionSpec) -> "LowRank":
        stack, d_in, d_out = self.layout.split(tuple(spec))
        parts: Any = self._partitioned(PartitionSpec(*stack))
        a, b = PartitionSpec(*stack, *d_in, None), PartitionSpec(*stack, None, *d_out)
        return dataclasses.replace(parts, a=a, b=b)

    def update(self, shape: tuple[int, ...]) -> jax.Array:
        matrix = self.as_matrix()
        with jax.default_matmul_precision("highest"):
            product = jnp.matmul(matrix.a, matrix.b) * self.scale[..., None, None]
        return self.layout.from_matrix(product, shape)

    def trainable(self) -> Self:
        return dataclasses.replace(cast(Any, self), a=self.train_a, b=True, scale=False)

    def check(self, path: str, base: AnyWeight) -> None:
        stack = self.stack_ndim
        ours = self.layout.joined(
            self.a.shape[:stack], self.a.shape[stack:-1], self.b.shape[stack + 1 :]
        )
        require_shape(path, ours, base)

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
