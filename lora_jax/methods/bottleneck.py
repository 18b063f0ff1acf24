"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751; He et al. 2022, arXiv:2110.04366)."""

import dataclasses
import math
from typing import Any, Self, cast

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.layouts import Layout
from lora_jax.methods.base import AnyWeight, DeltaNode, Method, require_shape
from lora_jax.weights import NARROW, UNSCALED, linear

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    """A small MLP behind a layer, or beside it, with a skip connection around it.

    Serial: `y = h + scale * (f(h @ down + down_bias) @ up + up_bias)` of the layer's own output
    `h = x @ w`. Parallel: the same MLP of its input x. At the start `up` and all biases are zero.

    Where adapters stand is a matter of targets. Houlsby et al. put them behind both sublayers, on a
    Llama `targets=("o_proj", "down_proj")`; Pfeiffer et al. (2021, arXiv:2005.00247) behind the
    MLP alone, `targets="down_proj"`. A bias that the model adds to h comes after the adapter.

    Attributes:
      size: the MLP's inner width.
      parallel: whether it stands beside the layer.
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
        if not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"Bottleneck(size={self.size!r}): expected an integer of at least 1.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"Bottleneck(activation={self.activation!r}): expected one of "
                f"{', '.join(ACTIVATIONS)}."
            )

    def fresh(self, weight: AnyWeight, *, layout: Layout, key: jax.Array) -> "Behind":
        stack, d_in, d_out = layout.split(weight.shape)
        read = d_in if self.parallel else d_out
        bound = 1 / math.sqrt(math.prod(read))

        def draw(layer_key):
            shape = (*read, self.size)
            return jax.random.uniform(layer_key, shape, jnp.float32, -bound, bound)

        for _ in stack:
            draw = jax.vmap(draw)
        return Behind(
            down=draw(key),
            down_bias=jnp.zeros((*stack, self.size), jnp.float32),
            up=jnp.zeros((*stack, self.size, *d_out), jnp.float32),
            up_bias=jnp.zeros((*stack, *d_out), jnp.float32),
            scale=jnp.full(stack, self.scale, jnp.float32),
            parallel=self.parallel,
            activation=self.activation,
            layout=layout,
        )


@flax.struct.dataclass
class Behind(DeltaNode):
    """The MLP of one layer, all float32.

    Attributes:
      down: `[stack..., output..., m]`, of a parallel one `[stack..., contracted..., m]`.
      down_bias: `[stack..., m]`.
      up: `[stack..., m, output...]`.
      up_bias: `[stack..., output...]`.
      scale: `[stack...]`.
    """

    down: jax.Array
    down_bias: jax.Array
    up: jax.Array
    up_bias: jax.Array
    scale: jax.Array
    parallel: bool = flax.struct.field(pytree_node=False, default=False)
    activation: str = flax.struct.field(pytree_node=False, default="relu")
    layout: Layout = flax.struct.field(pytree_node=False, default=Layout())

    @property
    def rank(self) -> int:
        return self.down.shape[-1]

    @property
    def stack_ndim(self) -> int:
        return jnp.ndim(self.scale)

    def linear(self, x: jax.Array, base: AnyWeight, dropout_key: jax.Array | None) -> jax.Array:
        del dropout_key
        h = checkpoint_name(linear(x, base), UNSCALED)
        return h + self.branch(x, h)

    def branch(self, x: jax.Array, h: jax.Array) -> jax.Array:
        """The MLP's output, scaled, for the layer's input and output."""

        def biased(product, bias):
            return product + jnp.broadcast_to(bias.astype(product.dtype), product.shape)

        inner = linear(x if self.parallel else h, self.down.astype(x.dtype))
        inner = checkpoint_name(biased(inner, self.down_bias), NARROW)
        wide = linear(ACTIVATIONS[self.activation](inner), self.up.astype(x.dtype))
        return biased(wide, self.up_bias) * self.scale.astype(x.dtype)

    def merge(self, base: AnyWeight) -> jax.Array:
        raise ValueError("a bottleneck is not linear: it has no merged form. Keep it beside.")

    def unmerge(self, merged: jax.Array) -> jax.Array:
        return self.merge(merged)

    def trainable(self) -> Self:
        every = jax.tree.map(lambda _: True, self)
        return dataclasses.replace(cast(Any, every), scale=False)

    def check(self, path: str, base: AnyWeight) -> None:
        stack = self.scale.shape
        _, d_in, _ = self.layout.split(base.shape)
        read, d_out = self.down.shape[len(stack) : -1], self.up_bias.shape[len(stack) :]
        d_in = read if self.parallel else d_in
        require_shape(path, self.layout.joined(stack, d_in, d_out), base)

    def as_matrix(self) -> "Behind":
        stack = self.scale.shape
        return dataclasses.replace(
            self,
            down=self.down.reshape(*stack, -1, self.rank),
            up=self.up.reshape(*stack, self.rank, -1),
            up_bias=self.up_bias.reshape(*stack, -1),
            layout=Layout(),
        )

    def padded(self, like: "Behind") -> "Behind":
        """Exact: f(0) = 0, so that the padding of `up` gets no gradient, and of `down` none."""

        def grown(leaf, axis):
            pads = [(0, 0)] * leaf.ndim
            pads[axis] = (0, like.rank - self.rank)
            return jnp.pad(leaf, pads)

        return dataclasses.replace(
            self,
            down=grown(self.down, -1),
            down_bias=grown(self.down_bias, -1),
            up=grown(self.up, self.stack_ndim),
        )

    def absent(self) -> "Behind":
        return jax.tree.map(jnp.zeros_like, self)
