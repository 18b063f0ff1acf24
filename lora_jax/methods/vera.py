"""VeRA: vector-based random matrix adaptation (Kopiczko et al. 2024, arXiv:2310.11454)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import flax.struct
import jax
import jax.numpy as jnp

from lora_jax.layouts import Layout
from lora_jax.methods.method import Method, Shape
from lora_jax.nodes import Additive, DeltaNode, Extra
from lora_jax.paths import stable_hash
from lora_jax.products import AnyWeight, Product
from lora_jax.schema import leaf, nested, static
from lora_jax.weights import Shared


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """`y = x @ w + ((x @ a * lambda_d) @ b) * lambda_b` with one frozen random pair a, b for all.

    The pair is initialised for the largest input and the largest output among the method's targets,
    as in PEFT, and each weight takes the leading rows of `a` and the leading columns of `b`. It
    is stored once, as the `Projection` that stands in the delta under `method.projection`: read
    its `a [d_in, r]` and `b [r, d_out]` to export it, replace the entry to import another.

    Attributes:
      rank: r of the shared pair.
      d_initial: the init of `lambda_d [r]`; that of `lambda_b [d_out]` is zero.
      dropout: the rate at which entries of the adapter's input are zeroed, as in `LoRA`.

    Raises:
      ValueError: for a rank below 1 or a dropout outside [0, 1).
    """

    rank: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0

    def __post_init__(self):
        self._require_count("rank", "a rank is an integer of at least 1.")
        self._require_rate("dropout")

    @property
    def projection(self) -> str:
        """The path of the pair in the delta; methods that differ have pairs of their own."""
        return f"vera_{stable_hash(repr(self)):08x}"

    def init_layer(self, d_in: Shape, d_out: Shape, layout: Layout, key: jax.Array) -> DeltaNode:
        del d_in, key
        return VeRANode(
            lambda_d=jnp.full(self.rank, self.d_initial, jnp.float32),
            lambda_b=jnp.zeros(d_out, jnp.float32),
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

        def uniform(key, *shape):  # He et al.'s uniform, over the axis that is summed
            bound = math.sqrt(6 / shape[0])
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        a, b = uniform(keys[0], d_in, self.rank), uniform(keys[1], self.rank, d_out)
        return {self.projection: VeRAProjection(a=a, b=b)}


@flax.struct.dataclass
class VeRAProjection(Extra):
    """The frozen pair that VeRA's targets share: `a [d_in, r]`, `b [r, d_out]`, float32."""

    own_axes = ("rows", "rank", "columns")
    in_weights: ClassVar[bool] = False

    a: jax.Array = leaf("stack rows rank", trained=False)
    b: jax.Array = leaf("stack rank columns", trained=False)


@flax.struct.dataclass
class VeRANode(Additive):
    """`a * lambda_d @ b * lambda_b`, of which the two vectors are this weight's own.

    Attributes:
      pair: once `bind` has filled it in, the leading rows of the projection's `a` and columns of
        its `b`, as many as this weight has.
      path: where in the delta the projection is.
    """

    own_axes = ("rank",)

    takes_experts = True

    lambda_d: jax.Array = leaf("stack rank")
    lambda_b: jax.Array = leaf("stack out", absent=0)
    pair: Shared | None = nested("", trained=False, default=None)
    path: str = static("")
    dropout: float = static(0.0)
    layout: Layout = static(Layout())

    def resolve(self, base: AnyWeight, nodes: Mapping[str, DeltaNode]) -> "VeRANode":
        if self.path not in nodes:
            raise ValueError(
                f"the delta lacks {self.path!r}, the projection that its VeRA nodes share. Keep "
                "that entry when you take a delta apart."
            )
        shared = cast(VeRAProjection, nodes[self.path])
        _, d_in, d_out = (math.prod(group) for group in self.layout.split(base.shape))
        (rows, rank), columns = shared.a.shape[-2:], shared.b.shape[-1]
        if shared.b.shape[-2] != rank or rank != self.rank or rows < d_in or columns < d_out:
            raise ValueError(
                f"cannot share the projection {self.path!r}, a {shared.a.shape} and b "
                f"{shared.b.shape}: this weight needs at least {(d_in, self.rank)} and "
                f"{(self.rank, d_out)}, of the same rank. Init it for all of the weights together."
            )
        pair = VeRAProjection(a=shared.a[..., :d_in, :], b=shared.b[..., :d_out])
        return dataclasses.replace(self, pair=Shared(pair))

    def branch(self, x: Any, product: Product) -> jax.Array:
        pair = cast(Shared, self.pair).value
        h = product.narrow(x, pair.a)
        h = h * jnp.broadcast_to(self.lambda_d.astype(h.dtype), h.shape)
        wide = product.widen(h, pair.b)
        return wide * jnp.broadcast_to(self.lambda_b.astype(wide.dtype), wide.shape)

    def factors(self) -> tuple[jax.Array, jax.Array]:
        pair = cast(Shared, self.pair).value
        a, b, d, out = (
            leaf.astype(jnp.float32) for leaf in (pair.a, pair.b, self.lambda_d, self.lambda_b)
        )
        return a * d[None], b * out[None]
