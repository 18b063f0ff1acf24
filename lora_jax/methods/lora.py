"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), and rsLoRA's scaling."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, Self

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lora_jax.layouts import Layout
from lora_jax.methods import optional_leaves
from lora_jax.methods.base import Additive, AnyWeight, DeltaNode, Method, require_shape
from lora_jax.methods.branches import drop, widen
from lora_jax.methods.decompositions import STARTS, factors_of
from lora_jax.weights import NARROW, as_matrix, embed, linear


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
        weight itself (see `decompositions.factors_of`), and what they begin with is subtracted
        again: the base stays what it is, quantised too, and the start changes nothing.
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

    @property
    def reads_values(self) -> bool:
        return self._decomposes

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
        a, b = a.reshape(*stack, *d_in, rank), b.reshape(*stack, rank, *d_out)
        return LowRank(
            a=a,
            b=b,
            scale=scale,
            a0=jnp.copy(a) if self._decomposes else None,  # of its own: a step may donate a
            b0=jnp.copy(b) if self._decomposes else None,
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


@optional_leaves.dataclass
class LowRank(Additive):
    """`scale * (a @ b - a0 @ b0)`, all float32.

    Padding the factors with zeros to a larger rank changes nothing, then or later: the gradient
    of each padded factor is a product with the other's zeros.

    Attributes:
      a, b: `[stack..., contracted..., r]` and `[stack..., r, output...]`.
      scale: `[stack...]`.
      a0, b0: frozen, what a and b were at the start, where that is a part of the weight (PiSSA,
        OLoRA). None where the start is zero.
      own_base: what made a base that the node belongs to instead of the original ("loftq"); empty
        for the original. It is a setting like the others: nodes that differ in it do not mix.
    """

    a: jax.Array
    b: jax.Array
    scale: jax.Array
    a0: jax.Array | None = None
    b0: jax.Array | None = None
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)
    layout: Layout = flax.struct.field(pytree_node=False, default=Layout())
    train_a: bool = flax.struct.field(pytree_node=False, default=True)
    own_base: str = flax.struct.field(pytree_node=False, default="")

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
        """`scale * x @ (a @ b - a0 @ b0)`: what is added to the base's output."""
        inner = linear(x, self.a.astype(x.dtype)) * self.scale.astype(x.dtype)
        y = widen(checkpoint_name(inner, NARROW), self.b.astype(x.dtype))
        if self.a0 is None or self.b0 is None:
            return y
        # A product of its own: where nothing is trained yet, the two are equal to the last bit.
        first = linear(x, self.a0.astype(x.dtype)) * self.scale.astype(x.dtype)
        return y - linear(first, self.b0.astype(x.dtype))

    def embed(self, tokens: jax.Array, base: AnyWeight) -> jax.Array:
        rows = embed(tokens, base)

        def added(a, b):
            inner = embed(tokens, a).astype(rows.dtype) * self.scale.astype(rows.dtype)
            return linear(inner, b.astype(rows.dtype))

        y = added(self.a, self.b)
        return rows + (y if self.a0 is None else y - added(self.a0, self.b0))

    def plain(self) -> "LowRank":
        """The same update by factors alone, of rank 2r where there are a0 and b0:
        `[a, a0] @ [b; -b0]`."""
        if self.a0 is None or self.b0 is None:
            return self
        a = jnp.concatenate([self.a, self.a0], axis=-1)
        b = jnp.concatenate([self.b, -self.b0], axis=self.stack_ndim)
        return dataclasses.replace(self, a=a, b=b, a0=None, b0=None)

    def transposed(self) -> "LowRank":
        def turned(leaf):
            return None if leaf is None else jnp.swapaxes(leaf, -1, -2)

        return self._with(turned(self.b), turned(self.a), turned(self.b0), turned(self.a0))

    def as_matrix(self) -> "LowRank":
        stack, matrix = self.a.shape[: self.stack_ndim], dataclasses.replace(self, layout=Layout())
        return matrix._each_factor(
            lambda a: a.reshape(*stack, -1, a.shape[-1]),
            lambda b: b.reshape(*stack, b.shape[len(stack)], -1),
        )

    def partition(self, spec: PartitionSpec) -> "LowRank":
        *stack, d_in, d_out = spec
        return self._split(stack, [d_in], [d_out])

    def placement(self, spec: PartitionSpec) -> "LowRank":
        return self._split(*self.layout.split(tuple(spec)))

    def _split(self, stack, d_in, d_out) -> "LowRank":
        a, b = PartitionSpec(*stack, *d_in, None), PartitionSpec(*stack, None, *d_out)
        parts: Any = self._partitioned(PartitionSpec(*stack))
        return parts._each_factor(lambda _: a, lambda _: b)

    def update(self, shape: tuple[int, ...]) -> jax.Array:
        matrix = self.as_matrix()
        with jax.default_matmul_precision("highest"):
            product = jnp.matmul(matrix.a, matrix.b)
            if matrix.a0 is not None and matrix.b0 is not None:
                product = product - jnp.matmul(matrix.a0, matrix.b0)
        return self.layout.from_matrix(product * self.scale[..., None, None], shape)

    def trainable(self) -> Self:
        frozen: Any = jax.tree.map(lambda _: False, self)
        return dataclasses.replace(frozen, a=self.train_a, b=True)

    def check(self, path: str, base: AnyWeight) -> None:
        stack = self.stack_ndim
        for a, b in ((self.a, self.b), (self.a0, self.b0)):
            if a is not None and b is not None:
                sides = a.shape[:stack], a.shape[stack:-1], b.shape[stack + 1 :]
                require_shape(path, self.layout.joined(*sides), base)

    def matched(self, other: DeltaNode) -> "LowRank":
        if not isinstance(other, LowRank) or other.a0 is None or self.a0 is not None:
            return self
        return dataclasses.replace(self, a0=jnp.zeros_like(self.a), b0=jnp.zeros_like(self.b))

    def padded(self, like: "LowRank") -> "LowRank":
        missing = like.rank - self.rank

        def grown(leaf, axis):
            pads = [(0, 0)] * leaf.ndim
            pads[axis] = (0, missing)
            return jnp.pad(leaf, pads)

        return self.matched(like)._each_factor(
            lambda a: grown(a, -1), lambda b: grown(b, self.stack_ndim)
        )

    def trimmed(self, like: "LowRank") -> "LowRank":
        node = dataclasses.replace(self, a0=None, b0=None) if like.a0 is None else self
        return super(LowRank, node).trimmed(like)

    def absent(self) -> "LowRank":
        return jax.tree.map(jnp.zeros_like, self)

    def _each_factor(self, change_a: Callable, change_b: Callable) -> "LowRank":
        started = self.a0 is not None
        return self._with(
            change_a(self.a),
            change_b(self.b),
            change_a(self.a0) if started else None,
            change_b(self.b0) if started else None,
        )

    def _with(self, a, b, a0, b0) -> "LowRank":
        return dataclasses.replace(self, a=a, b=b, a0=a0, b0=b0)
