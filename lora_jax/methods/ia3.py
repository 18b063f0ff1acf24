"""IA3: activations rescaled by learned vectors (Liu et al. 2022, arXiv:2205.05638, section 3.3)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp

from lora_jax.layouts import ENTRIES, Layout
from lora_jax.methods.method import Method, Shape
from lora_jax.nodes import BoundPlain, DeltaNode
from lora_jax.products import AnyWeight, Product, scaled
from lora_jax.schema import leaf, static
from lora_jax.weights import Shared, dense_float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """`y = (x @ w) * l`, or `y = (x * l) @ w` where the input is scaled; init `l = 1`.

    The paper scales keys, values and the MLP's inner activations. On a Llama that is
    `{"k_proj|v_proj": IA3(), "down_proj": IA3(scales="input")}`. A bias that the model adds is not
    scaled, unless the delta holds an `IA3BiasNode` for it.

    Attributes:
      scales: which side of the weight `l` multiplies: "output" or "input".

    Raises:
      ValueError: for another value of `scales`.
    """

    scales: str = "output"

    def __post_init__(self):
        known = self.scales in ("output", "input")
        self._require("scales", known, "expected 'output' or 'input'.")

    def init_layer(self, d_in: Shape, d_out: Shape, layout: Layout, key: jax.Array) -> DeltaNode:
        del key
        output = self.scales == "output"
        node_class, side = (IA3Node, d_out) if output else (IA3InputNode, d_in)
        return node_class(jnp.ones(side, jnp.float32), jnp.ones((), jnp.float32), layout)


@flax.struct.dataclass
class IA3Node(DeltaNode):
    """A weight whose output is multiplied by a vector.

    Attributes:
      l: the vector, float32.
      active: 0 where an adapter of a stack lacks the target: `l` is then neither applied nor
        trained.
    """

    part_axes = ("in", "out")
    takes_experts = True

    l: jax.Array = leaf("stack out")  # noqa: E741 - the paper's name
    active: jax.Array = leaf("stack", trained=False, absent=0)
    layout: Layout = static(Layout())
    input: bool = static(False)

    def post(self, y: jax.Array) -> jax.Array:
        return scaled(y, self.factor())

    def unmerge(self, merged: jax.Array) -> jax.Array:
        """Where an entry of `l` is zero, what it multiplied is lost, and becomes NaN."""
        factors = self.merge(jnp.ones(merged.shape, jnp.float32))
        return (merged.astype(jnp.float32) / factors).astype(merged.dtype)

    def factor(self) -> jax.Array:
        """What a side of the weight is multiplied by, in the shape of `l`."""
        own = [1] * (self.l.ndim - self.active.ndim)
        active = self.active.reshape(*self.active.shape, *own)
        return jnp.where(active == 0, jnp.ones_like(self.l), self.l)


@flax.struct.dataclass
class IA3InputNode(IA3Node):
    """A weight whose input is multiplied by a vector `l [stack..., contracted...]`."""

    l: jax.Array = leaf("stack in")  # noqa: E741
    input: bool = static(True)
    post = DeltaNode.post

    def pre(self, x: Any, product: Product) -> Any:
        return product.scale(x, self.factor())


@flax.struct.dataclass
class IA3BiasNode(BoundPlain):
    """A layer's bias multiplied by the vector of that layer's `IA3Node`, so that the two compute
    `(x @ w + bias) * l`. It has no leaves of its own.

    Attributes:
      of: the path of the `IA3Node`.
      factor: that node's, once `resolve` has filled it in.
    """

    not_by_row = (
        "IA3 over a layer with a bias cannot be chosen by row with adapter_ids, since all rows "
        "read one bias. Bind one of the adapters."
    )
    unmerge = IA3Node.unmerge

    of: str = static()
    factor: Shared | None = leaf("stack", trained=False, default=None)
    layout: Layout = static(ENTRIES)

    def resolve(self, base: AnyWeight, nodes: Mapping[str, DeltaNode]) -> "IA3BiasNode":
        found = nodes.get(self.of)
        if not isinstance(found, IA3Node) or found.input:
            raise ValueError(
                f"a bias is scaled by the output-side IA3 at {self.of!r}, which the delta lacks. "
                "Keep the two together."
            )
        factor = found.factor()
        if factor.shape[-base.ndim :] != base.shape:
            raise ValueError(
                f"a bias of shape {base.shape} is scaled by the IA3 at {self.of!r}, whose vector "
                f"has shape {factor.shape}. Is it the bias of that layer?"
            )
        return dataclasses.replace(self, factor=Shared(factor))

    def merge(self, base: AnyWeight) -> jax.Array:
        return (dense_float32(base) * cast(Shared, self.factor).value).astype(base.dtype)
