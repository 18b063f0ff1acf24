"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), and rsLoRA's scaling."""

import dataclasses
import functools
import math
from typing import Any, ClassVar, Literal

import flax.struct
import jax
import jax.numpy as jnp

from lora_jax.layouts import Layout
from lora_jax.methods.decompositions import INITS, factors_of
from lora_jax.methods.method import Method, MisfitError, Shape, over_layers
from lora_jax.nodes import Additive, DeltaNode
from lora_jax.products import AnyWeight, Product
from lora_jax.schema import leaf, static
from lora_jax.weights import as_matrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """`y = x @ w + scale * dropout(x) @ a @ b`; init `b = 0`, or `a = 0`.

    Attributes:
      rank: r, the inner dimension of `a [d_in, r]` and `b [r, d_out]`. A tuple gives each layer of
        a stacked weight its own: factors are padded with zeros to the largest, which is exact, and
        a layer of rank 0 stays as it is. See `allocate_ranks`.
      alpha: the numerator of the scale.
      scaling: "lora" for `alpha / r` (section 4.1 of the paper), "rslora" for `alpha / sqrt(r)`
        (Kalajdzievski 2023, arXiv:2312.03732).
      dropout: the rate at which entries of the adapter's input are zeroed while a `dropout_key` is
        bound; what remains is divided by `1 - dropout`.
      init: how `a` is initialised: "kaiming" is uniform on +-1/sqrt(d_in), as in PEFT; "gaussian"
        has standard deviation `1 / r`. "zero_a" has `a = 0` and `b` uniform on +-1/sqrt(r) instead
        (Init[B] of Hayou et al. 2024, arXiv:2406.08447). "pissa", "pissa_niter_N" and "olora" take
        `a0` and `b0` from the weight itself (`decompositions.factors_of`), initialise a and b with
        them, and add `scale * (a @ b - a0 @ b0)`. The papers move `a0 @ b0` into the base; here the
        base does not change, quantised or not, and arms may share it. `as_plain_lora` converts to
        plain factors.
      train_a: False freezes `a` at its init: LoRA-FA (Zhang et al. 2023, arXiv:2308.03303).
        No gradient of `a` is computed. The paper's correction of `b`'s gradient is `project_b`.

    Raises:
      ValueError: for a rank below 1 (None is the method that adapts nothing), an alpha that is not
        positive, a dropout outside [0, 1), an unknown scaling or init, a zero `a` that is frozen.
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
        self._require(
            "rank",
            fits and max(ranks, default=0) >= 1,
            "a rank is an integer of at least 1, or a tuple of one for each stacked layer. To "
            "leave a target unadapted, map it to None.",
        )
        self._require("alpha", self.alpha > 0, "alpha must be positive.")
        self._require_rate("dropout")
        self._require_one_of("scaling", ("lora", "rslora"))
        known = self.init in ("kaiming", "gaussian", "zero_a") or self._decomposes
        expected = "expected one of kaiming, gaussian, zero_a, pissa, pissa_niter_N, olora."
        self._require("init", known, expected)
        frozen = not self.train_a and self.init == "zero_a"
        self._require("train_a", not frozen, "a that is zero and frozen adapts nothing.")

    def init_node(
        self, path: str, weight: AnyWeight, *, layout: Layout, key: jax.Array
    ) -> DeltaNode:
        del path
        return LoRANode(**self.leaves(weight, layout=layout, key=key))

    def in_groups(self, groups: int) -> "LoRA":
        if groups == 1:
            return self
        if isinstance(self.rank, tuple) or self.rank % groups:
            raise MisfitError(
                f"{self._named('rank')} is not divisible by the {groups} groups of this "
                "convolution, each of which has factors of its own. Give that target a rank that "
                f"is, {{target: {type(self).__name__}(rank={groups})}}, or leave it out (None)."
            )
        alpha = self.alpha / (groups if self.scaling == "lora" else math.sqrt(groups))
        return dataclasses.replace(self, rank=self.rank // groups, alpha=alpha)

    @property
    def reads_values(self) -> bool:
        return self._decomposes

    def leaves(self, weight: AnyWeight, *, layout: Layout, key: jax.Array) -> dict[str, Any]:
        """The initial fields of a `LoRANode`."""
        stack, d_in, d_out = layout.split(weight.shape)
        rank = self._widest(stack)
        self._require_sides(rank, d_in, d_out)
        ranks = jnp.broadcast_to(jnp.asarray(self.rank, jnp.float32), stack)
        scale = self.alpha / (ranks if self.scaling == "lora" else jnp.sqrt(ranks))
        scale = jnp.where(ranks == 0, 0, scale)
        if self._decomposes:
            a, b = factors_of(self.init, as_matrix(weight, layout), rank, scale, key)
        else:
            init = functools.partial(self._init_factors, math.prod(d_in), rank, math.prod(d_out))
            a, b = over_layers(init, stack)(key, ranks)
        if isinstance(self.rank, tuple):
            index = jnp.broadcast_to(jnp.arange(rank, dtype=jnp.float32), (*stack, rank))
            used = index < ranks[..., None]
            a, b = jnp.where(used[..., None, :], a, 0), jnp.where(used[..., None], b, 0)
        a, b = a.reshape(*stack, *d_in, rank), b.reshape(*stack, rank, *d_out)
        frozen = {}
        if self._decomposes:  # buffers of their own: a step may donate a
            frozen = {"a0": jnp.copy(a), "b0": jnp.copy(b)}
        settings = {"dropout": self.dropout, "layout": layout, "train_a": self.train_a}
        return {"a": a, "b": b, "scale": scale} | frozen | settings

    def _init_factors(
        self, d_in: int, rank: int, d_out: int, key: jax.Array, layer_rank: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The factors of one layer, in which one of the two is zero."""
        a, b = jnp.zeros((d_in, rank), jnp.float32), jnp.zeros((rank, d_out), jnp.float32)
        used = jnp.maximum(layer_rank, 1)
        if self.init == "zero_a":
            return a, jax.random.uniform(key, b.shape, b.dtype, -1, 1) / jnp.sqrt(used)
        if self.init == "gaussian":
            return jax.random.normal(key, a.shape, a.dtype) / used, b
        bound = 1 / math.sqrt(d_in)
        return jax.random.uniform(key, a.shape, a.dtype, -bound, bound), b

    @property
    def _decomposes(self) -> bool:
        """Whether the factors are initialised from the weight."""
        return bool(INITS.fullmatch(self.init))

    def _widest(self, stack: Shape) -> int:
        """The rank that the factors are padded to."""
        if isinstance(self.rank, tuple) and stack != (len(self.rank),):
            raise ValueError(
                f"{self._named('rank')} names {len(self.rank)} stacked layers, but the weight's "
                f"stack axes are {stack}. Give one rank, or one for each stacked layer."
            )
        return max(self.rank) if isinstance(self.rank, tuple) else self.rank


@flax.struct.dataclass
class LowRank(Additive):
    """The factors of `scale * (a @ b - a0 @ b0)`, all float32, and their branch.

    Attributes:
      a0, b0: the factors that the init took from the weight, frozen; None where it took none.
      train_a: whether `a` trains.
      own_base: how the base was made that the node belongs to ("loftq"); empty for the original. It
        is a setting like the others: nodes that differ in it do not mix.
    """

    own_axes = ("rank",)
    padded_axes = ("rank",)
    split_axes: ClassVar[tuple[str, ...]] = ("in", "out")
    part_axes: ClassVar[tuple[str, ...]] = ("in", "out")
    takes_experts = True

    a: jax.Array = leaf("stack in rank", trained="train_a", mirror="b")
    b: jax.Array = leaf("stack rank out", absent=0, mirror="a")
    scale: jax.Array = leaf("stack", trained=False)
    a0: jax.Array | None = leaf("stack in rank", trained=False, mirror="b0", default=None)
    b0: jax.Array | None = leaf("stack rank out", trained=False, mirror="a0", default=None)
    dropout: float = static(0.0)
    layout: Layout = static(Layout())
    train_a: bool = static(True)
    own_base: str = static("")

    def branch(self, x: Any, product: Product) -> jax.Array:
        added = self._low_rank(x, product, self.a, self.b)
        if self.a0 is None:
            return added
        return added - self._low_rank(x, product, self.a0, self.b0)

    def factors(self) -> tuple[jax.Array, jax.Array] | None:
        """At the init the differences are zero, and not only rounding."""
        a, b = self.a.astype(jnp.float32), self.b.astype(jnp.float32)
        scale = self.scale.astype(jnp.float32)
        if self.a0 is None or self.b0 is None:
            return a, b * scale
        a0, b0 = self.a0.astype(jnp.float32), self.b0.astype(jnp.float32)
        # a b - a0 b0 = (a - a0) b + a0 (b - b0)
        columns, rows = [a - a0, a0], [b * scale, (b - b0) * scale]
        return jnp.concatenate(columns, axis=-1), jnp.concatenate(rows, axis=0)

    def _low_rank(self, x: Any, product: Product, a: jax.Array, b: Any) -> jax.Array:
        h = product.narrow(x, a)
        return product.widen(h * self.scale.astype(h.dtype), b)


@flax.struct.dataclass
class LoRANode(LowRank):
    """The weight plus `scale * (a @ b - a0 @ b0)`."""
