"""VeRA: vector-based random matrix adaptation (Kopiczko et al. 2024, arXiv:2310.11454)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self, cast

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.layouts import Layout
from lora_jax.methods.base import Additive, AnyWeight, Extra, Method, require_shape
from lora_jax.methods.branches import drop
from lora_jax.paths import stable_hash
from lora_jax.weights import NARROW, Shared, linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """`y = x @ w + ((x @ a * lambda_d) @ b) * lambda_b` with one frozen random pair a, b for all.

    The pair is drawn for the largest input and the largest output among the method's targets, as
    PEFT has it, and each weight takes the leading rows of `a` and the leading columns of `b`. It
    is stored once, as the `Projection` that stands in the delta under `method.projection`: read
    its `a [d_in, r]` and `b [r, d_out]` to export it, replace the entry to import another.

    Attributes:
      rank: r of the shared pair.
      d_initial: where `lambda_d [r]` starts; `lambda_b [d_out]` starts at zero.
      dropout: the rate at which entries of the adapter's input are zeroed, as in `LoRA`.

    Raises:
      ValueError: for a rank below 1 or a dropout outside [0, 1).
    """

    rank: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0

    def __post_init__(self):
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"VeRA(rank={self.rank!r}): a rank is an integer of at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"VeRA(dropout={self.dropout!r}): the rate must lie in [0, 1).")

    @property
    def projection(self) -> str:
        """The path of the pair in the delta; methods that differ have pairs of their own."""
        return f"vera_{stable_hash(repr(self)):08x}"

    def fresh(self, weight: AnyWeight, *, layout: Layout, key: jax.Array) -> "SharedLowRank":
        del key
        stack, _, d_out = layout.split(weight.shape)
        return SharedLowRank(
            lambda_d=jnp.full((*stack, self.rank), self.d_initial, jnp.float32),
            lambda_b=jnp.zeros((*stack, *d_out), jnp.float32),
            path=self.projection,
            dropout=self.dropout,
            layout=layout,
        )

    def extras(
        self, weights: Mapping[str, AnyWeight], *, layouts: Mapping[str, Layout], key: jax.Array
    ) -> dict[str, Extra]:
        sides = [layouts[path].split(weight.shape)[1:] for path, weight in weights.items()]
        d_in, d_out = (max(math.prod(side) for side in each) for each in zip(*sides, strict=True))
        keys = jax.random.split(jax.random.fold_in(key, stable_hash(self.projection)))

        def draw(key, *shape):  # He et al.'s uniform, over the axis that is summed
            bound = math.sqrt(6 / shape[0])
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        pair = Projection(a=draw(keys[0], d_in, self.rank), b=draw(keys[1], self.rank, d_out))
        return {self.projection: pair}


@flax.struct.dataclass
class Projection(Extra):
    """The frozen pair that VeRA's targets share: `a [d_in, r]`, `b [r, d_out]`, float32."""

    a: jax.Array
    b: jax.Array
    in_weights: ClassVar[bool] = False

    def trainable(self) -> Self:
        return dataclasses.replace(cast(Any, self), a=False, b=False)

    def absent(self) -> Self:
        return self


@flax.struct.dataclass
class SharedLowRank(Additive):
    """`a * lambda_d @ b * lambda_b`, of which the two vectors are this weight's own.

    Attributes:
      lambda_d: `[stack..., r]`, float32.
      lambda_b: `[stack..., output...]`, float32.
      pair: the `Projection`, once `bind` has filled it in.
      path: where in the delta it stands.
    """

    lambda_d: jax.Array
    lambda_b: jax.Array
    pair: Shared | None = None
    path: str = flax.struct.field(pytree_node=False, default="")
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)
    layout: Layout = flax.struct.field(pytree_node=False, default=Layout())

    @property
    def rank(self) -> int:
        return self.lambda_d.shape[-1]

    @property
    def stack_ndim(self) -> int:
        return self.lambda_d.ndim - 1

    def resolve(self, extras: Mapping[str, Extra]) -> "SharedLowRank":
        if self.path not in extras:
            raise ValueError(
                f"the delta lacks {self.path!r}, the projection that its VeRA nodes share. Keep "
                "that entry when you take a delta apart."
            )
        return dataclasses.replace(self, pair=Shared(extras[self.path]))

    def linear(self, x: jax.Array, base: AnyWeight, dropout_key: jax.Array | None) -> jax.Array:
        x_drop = x if dropout_key is None else drop(x, self.dropout, dropout_key)
        a, b = self._slices(x.shape[-1])
        inner = linear(x_drop, a.astype(x.dtype))
        inner = inner * jnp.broadcast_to(self.lambda_d.astype(x.dtype), inner.shape)
        wide = linear(checkpoint_name(inner, NARROW), b.astype(x.dtype))
        return linear(x, base) + wide * jnp.broadcast_to(self.lambda_b.astype(x.dtype), wide.shape)

    def update(self, shape: tuple[int, ...]) -> jax.Array:
        node, (stack, d_in, _) = self.as_matrix(), self.layout.split(shape)
        a, b = node._slices(math.prod(d_in))
        with jax.default_matmul_precision("highest"):
            left = jnp.broadcast_to(a, (*stack, *a.shape)) * node.lambda_d[..., None, :]
            product = jnp.matmul(left, jnp.broadcast_to(b, (*stack, *b.shape)))
        return self.layout.from_matrix(product * node.lambda_b[..., None, :], shape)

    def as_matrix(self) -> "SharedLowRank":
        stack = self.lambda_d.shape[:-1]
        return dataclasses.replace(
            self, lambda_b=self.lambda_b.reshape(*stack, -1), layout=Layout()
        )

    def trainable(self) -> Self:
        pair = jax.tree.map(lambda _: False, self.pair)
        return dataclasses.replace(cast(Any, self), lambda_d=True, lambda_b=True, pair=pair)

    def check(self, path: str, base: AnyWeight) -> None:
        _, d_in, _ = self.layout.split(base.shape)
        d_out = self.lambda_b.shape[self.stack_ndim :]
        require_shape(path, self.layout.joined(self.lambda_d.shape[:-1], d_in, d_out), base)
        if self.pair is None:
            return
        shared = self.pair.value
        needed = math.prod(d_in), self.rank, math.prod(d_out)
        found = (*shared.a.shape, shared.b.shape[-1])
        fits = shared.b.shape[0] == found[1] == needed[1]
        if not fits or found[0] < needed[0] or found[2] < needed[2]:
            raise ValueError(
                f"{path}: cannot share the projection {self.path!r}, a {shared.a.shape} and b "
                f"{shared.b.shape}: this weight needs at least {needed[:2]} and {needed[1:]}, of "
                "the same rank. Draw it for all of the weights together."
            )

    def absent(self) -> "SharedLowRank":
        return jax.tree.map(jnp.zeros_like, self)

    def _slices(self, d_in: int) -> tuple[jax.Array, jax.Array]:
        pair = cast(Shared, self.pair).value
        return pair.a[:d_in], pair.b[:, : self.lambda_b.shape[-1]]
