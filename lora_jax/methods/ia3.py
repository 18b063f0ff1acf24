"""IA3: activations rescaled by learned vectors (Liu et al. 2022, arXiv:2205.05638, section 3.3)."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lora_jax.layouts import Layout
from lora_jax.methods.method import Method
from lora_jax.nodes import DeltaNode
from lora_jax.products import AnyWeight, Product, scaled
from lora_jax.schema import leaf, static


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """`y = (x @ w) * l`, or `y = (x * l) @ w` where the input is scaled; `l` starts at one.

    The paper scales keys, values and the MLP's inner activations. On a Llama that is
    `{"k_proj|v_proj": IA3(), "down_proj": IA3(scales="input")}`.

    Attributes:
      scales: which side of the weight `l` multiplies: "output" or "input".

    Raises:
      ValueError: for another value of `scales`.
    """

    scales: str = "output"

    def __post_init__(self):
        if self.scales not in ("output", "input"):
            raise ValueError(f"IA3(scales={self.scales!r}): expected 'output' or 'input'.")

    def init_node(
        self, path: str, weight: AnyWeight, *, layout: Layout, key: jax.Array
    ) -> "IA3Node":
        del path, key
        stack, d_in, d_out = layout.split(weight.shape)
        kind, side = (IA3Node, d_out) if self.scales == "output" else (IA3InputNode, d_in)
        return kind(
            l=jnp.ones((*stack, *side), jnp.float32),
            active=jnp.ones(stack, jnp.float32),
            layout=layout,
        )


@flax.struct.dataclass
class IA3Node(DeltaNode):
    """A weight whose output is multiplied by a vector.

    Attributes:
      l: `[stack..., output...]`, float32.
      active: `[stack...]`, 0 where a member of a stack lacks the target: `l` is then neither
        applied nor trained.
      layout: the weight's axes.
    """

    l: jax.Array = leaf("stack out")  # noqa: E741 - the paper's name
    active: jax.Array = leaf("stack", trained=False, absent=0)
    layout: Layout = static(Layout())
    input: bool = static(False)

    def post(self, y: jax.Array) -> jax.Array:
        return scaled(y, self.factor())

    def unmerge(self, merged: jax.Array) -> jax.Array:
        """Where an entry of `l` is zero, what it multiplied is lost, and becomes NaN."""
        return self._each_matrix(lambda node, w: w / node.factor()[None], merged).astype(
            merged.dtype
        )

    def factor(self) -> jax.Array:
        """What one layer's output is multiplied by."""
        return jnp.where(self.active == 0, jnp.ones_like(self.l), self.l)


@flax.struct.dataclass
class IA3InputNode(IA3Node):
    """A weight whose input is multiplied by a vector `l [stack..., contracted...]`."""

    l: jax.Array = leaf("stack in")  # noqa: E741
    input: bool = static(True)
    post = DeltaNode.post

    def pre(self, x: Any, product: Product) -> Any:
        return product.scale(x, self.factor())

    def unmerge(self, merged: jax.Array) -> jax.Array:
        return self._each_matrix(lambda node, w: w / node.factor()[:, None], merged).astype(
            merged.dtype
        )
