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
from lora_jax.weights import NARROW, embed, linear


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
        has standard deviation `1 / r`.
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
    init: Literal["kaiming", "gaussian"] = "kaiming"
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
        self._one_of("scaling", ("lora", "rslora"))
        self._one_of("init", ("kaiming", "gaussian"))

    def fresh(self, weight: AnyWeight, *, layout: Layout, key: jax.Array) -> DeltaNode:
        return self.low_rank(weight, layout=layout, key=key)

    def low_rank(self, weight: AnyWeight, *, layout: Layout, key: jax.Array) -> "LowRank":
        """The fresh pair of factors."""
        stack, d_in, d_out = layout.split(weight.shape)
        rank = self._widest(stack, math.prod(d_in), math.prod(d_out))
        ranks = jnp.asarray(self.rank, jnp.float32)  # a scalar, or one for each layer

        def draw(layer_key):
            shape = (*d_in, rank)
            if self.init == "gaussian":
                return jax.random.normal(layer_key, shape, jnp.float32)
            bound = 1 / math.sqrt(math.prod(d_in))
            return jax.random.uniform(layer_key, shape, jnp.float32, -bound, bound)

        for _ in stack:
            draw = jax.vmap(draw)
        a = draw(key)
        per_layer = ranks.reshape(ranks.shape + (1,) * (a.ndim - ranks.ndim))
        if self.init == "gaussian":
            a = a / jnp.maximum(per_layer, 1)
        if ranks.ndim:
            index = jnp.arange(rank, dtype=jnp.float32).reshape((1,) * (a.ndim - 1) + (-1,))
            a = jnp.where(index < per_layer, a, 0)
        scale = self.alpha / (ranks if self.scaling == "lora" else jnp.sqrt(ranks))
        return LowRank(
            a=a,
            b=jnp.zeros((*stack, rank, *d_out), jnp.float32),
            scale=jnp.broadcast_to(jnp.where(ranks == 0, 0, scale), stack),
            dropout=self.dropout,
            layout=layout,
            train_a=self.train_a,
        )

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

    def _one_of(self, field: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, field) not in allowed:
            raise ValueError(f"{self._named(field)}: expected one of {', '.join(allowed)}.")


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
    return _widen(_vary(inner, like=b), _vary(b, like=inner))


def _vary(x: jax.Array, *, like: jax.Array) -> jax.Array:
    """Inside a shard_map: `x` said to differ along the mesh axes that `like` differs along, so that
    its gradient is summed over them."""
    missing = jax.typeof(like).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x


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
