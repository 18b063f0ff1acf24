"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751; He et al. 2022, arXiv:2110.04366)."""

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lora_jax.layouts import Layout
from lora_jax.methods.method import Method, Shape
from lora_jax.nodes import DeltaNode
from lora_jax.products import Matmul, Product
from lora_jax.schema import leaf, static

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    """A small MLP after a layer, or beside it, with a skip connection around it.

    Serial: `y = h + scale * (f(h @ down + down_bias) @ up + up_bias)` of the layer's own output
    `h = x @ w`. Parallel: the same MLP of its input x. Init: `up` and all biases are zero.

    The targets decide where adapters are. Houlsby et al. put them after both sublayers, on a
    Llama `targets=("o_proj", "down_proj")`; Pfeiffer et al. (2021, arXiv:2005.00247) after the
    MLP alone, `targets="down_proj"`. A bias that the model adds to h comes after the adapter.

    Attributes:
      size: the MLP's inner width.
      parallel: whether it is beside the layer.
      activation: f: "relu" (Pfeiffer), "silu" (Houlsby's swish) or "gelu".
      scale: what the MLP's output is multiplied by; 4 in He et al.'s parallel adapter.

    Raises:
      ValueError: for a size below 1 or an unknown activation.
    """

    size: int = 64
    parallel: bool = False
    activation: str = "relu"
    scale: float = 1.0

    def __post_init__(self):
        self._require_count("size")
        self._require_one_of("activation", ACTIVATIONS)

    def init_layer(self, d_in: Shape, d_out: Shape, layout: Layout, key: jax.Array) -> DeltaNode:
        read = d_in if self.parallel else d_out
        bound = 1 / math.sqrt(math.prod(read))
        node_class = ParallelBottleneckNode if self.parallel else BottleneckNode
        return node_class(
            down=jax.random.uniform(key, (*read, self.size), jnp.float32, -bound, bound),
            down_bias=jnp.zeros(self.size, jnp.float32),
            up=jnp.zeros((self.size, *d_out), jnp.float32),
            up_bias=jnp.zeros(d_out, jnp.float32),
            scale=jnp.float32(self.scale),
            activation=self.activation,
            layout=layout,
        )


@flax.struct.dataclass
class BottleneckNode(DeltaNode):
    """The MLP after one layer, all float32. Padding its width is exact, since f(0) = 0."""

    own_axes = ("rank",)
    padded_axes = ("rank",)
    unmerged = "a bottleneck is not linear: it has no merged form. Keep it beside."

    down: jax.Array = leaf("stack out rank")
    down_bias: jax.Array = leaf("stack rank")
    up: jax.Array = leaf("stack rank out", absent=0)
    up_bias: jax.Array = leaf("stack out", absent=0)
    scale: jax.Array = leaf("stack", trained=False)
    activation: str = static("relu")
    layout: Layout = static(Layout())
    parallel: bool = static(False)

    def post(self, y: jax.Array) -> jax.Array:
        return y + self.mlp(y, Matmul())

    def mlp(self, x: Any, product: Product) -> jax.Array:
        """The MLP's output, scaled."""

        def biased(h, bias):
            return h + jnp.broadcast_to(bias.astype(h.dtype), h.shape)

        h = ACTIVATIONS[self.activation](biased(product.narrow(x, self.down), self.down_bias))
        wide = biased(product.widen(h, self.up), self.up_bias)
        return wide * self.scale.astype(wide.dtype)


@flax.struct.dataclass
class ParallelBottleneckNode(BottleneckNode):
    """The MLP beside one layer, of whose input it reads."""

    down: jax.Array = leaf("stack in rank")
    parallel: bool = static(True)
    post = DeltaNode.post

    def branch(self, x: Any, product: Product) -> jax.Array:
        return self.mlp(x, product)
