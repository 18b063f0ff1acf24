"""IA3: activations rescaled by learned vectors (Liu et al. 2022, arXiv:2205.05638, section 3.3)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self, cast

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lora_jax.layouts import Layout
from lora_jax.methods.base import AnyWeight, DeltaNode, Method, require_shape
from lora_jax.weights import UNSCALED, Shared, dense_float32, linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """`y = (x @ w) * l`, or `y = (x * l) @ w` where the input is scaled; `l` starts at one.

    The paper scales keys, values and the MLP's inner activations. On a Llama that is
    `{"k_proj|v_proj": IA3(), "down_proj": IA3(scales="input")}`. A bias that the model adds is not
    scaled, unless the delta holds a `RescaledBias` for it.

    Attributes:
      scales: which side of the weight `l` multiplies: "output" or "input".

    Raises:
      ValueError: for another value of `scales`.
    """

    scales: str = "output"

    def __post_init__(self):
        if self.scales not in ("output", "input"):
            raise ValueError(f"IA3(scales={self.scales!r}): expected 'output' or 'input'.")

    def fresh(self, weight: AnyWeight, *, layout: Layout, key: jax.Array) -> "Rescaled":
        del key
        stack, d_in, d_out = layout.split(weight.shape)
        shape = (*stack, *(d_out if self.scales == "output" else d_in))
        return Rescaled(
            l=jnp.ones(shape, jnp.float32),
            active=jnp.ones(stack, jnp.float32),
            input=self.scales == "input",
            layout=layout,
        )


@flax.struct.dataclass
class Rescaled(DeltaNode):
    """A weight whose output or input is multiplied by a vector.

    Attributes:
      l: `[stack..., output...]`, or `[stack..., contracted...]` where the input is scaled; float32.
      active: `[stack...]`, 0 where a member of a stack lacks the target: `l` is then neither
        applied nor trained.
      input: whether `l` multiplies the input.
      layout: the weight's axes.
    """

    l: jax.Array  # noqa: E741 - the paper's name
    active: jax.Array
    input: bool = flax.struct.field(pytree_node=False, default=False)
    layout: Layout = flax.struct.field(pytree_node=False, default=Layout())

    @property
    def stack_ndim(self) -> int:
        return jnp.ndim(self.active)

    def linear(self, x: jax.Array, base: AnyWeight, dropout_key: jax.Array | None) -> jax.Array:
        del dropout_key
        if self.input:
            return linear(self._scaled(x), base)
        return self._scaled(checkpoint_name(linear(x, base), UNSCALED))

    def merge(self, base: AnyWeight) -> jax.Array:
        return self._each_entry(base, jnp.multiply)

    def unmerge(self, merged: jax.Array) -> jax.Array:
        """Where an entry of `l` is zero, what it multiplied is lost, and becomes NaN."""
        return self._each_entry(merged, jnp.divide)

    def trainable(self) -> Self:
        return dataclasses.replace(cast(Any, self), l=True, active=False)

    def check(self, path: str, base: AnyWeight) -> None:
        _, d_in, d_out = self.layout.split(base.shape)
        ours = self.l.shape[self.stack_ndim :]
        sides = (ours, d_out) if self.input else (d_in, ours)
        require_shape(path, self.layout.joined(self.active.shape, *sides), base)

    def as_matrix(self) -> "Rescaled":
        vectors = self.l.reshape(*self.active.shape, -1)
        return dataclasses.replace(self, l=vectors, layout=Layout())

    def absent(self) -> "Rescaled":
        return dataclasses.replace(self, active=jnp.zeros_like(self.active))

    def _factor(self) -> jax.Array:
        active = self.active.reshape(self.active.shape + (1,) * (self.l.ndim - self.active.ndim))
        return jnp.where(active == 0, jnp.ones_like(self.l), self.l)

    def _scaled(self, x: jax.Array) -> jax.Array:
        """In float32, and rounded once."""
        product = x.astype(jnp.float32) * jnp.broadcast_to(self._factor(), x.shape)
        return product.astype(x.dtype)

    def _each_entry(self, weight: AnyWeight, operation) -> jax.Array:
        matrix = self.layout.to_matrix(dense_float32(weight))
        factor = self.as_matrix()._factor()
        factor = factor[..., :, None] if self.input else factor[..., None, :]
        changed = operation(matrix, factor)
        return self.layout.from_matrix(changed, weight.shape).astype(weight.dtype)


@flax.struct.dataclass
class RescaledBias(DeltaNode):
    """A layer's bias multiplied by the vector of that layer's `Rescaled`, so that the two compute
    `(x @ w + bias) * l`. It has no leaves of its own.

    Attributes:
      of: the path of the `Rescaled`.
      source: that node; `resolve` fills it in.
    """

    of: str = flax.struct.field(pytree_node=False)
    source: Rescaled | None = None

    @property
    def stack_ndim(self) -> int:
        return 0 if self.source is None else self.source.stack_ndim

    def resolve(self, nodes: Mapping[str, DeltaNode]) -> "RescaledBias":
        found = nodes.get(self.of)
        if not isinstance(found, Rescaled) or found.input:
            raise ValueError(
                f"a bias is scaled by the output-side IA3 at {self.of!r}, which the delta lacks. "
                "Keep the two together."
            )
        return dataclasses.replace(self, source=found)

    def bind(
        self, base: AnyWeight, dropout_key: jax.Array | None, adapter_ids: Shared | None
    ) -> AnyWeight:
        """The plain product: a model may read a bias in any way it likes."""
        del dropout_key
        if adapter_ids is not None:
            raise ValueError(
                "IA3 over a layer with a bias cannot be chosen by row with adapter_ids, since all "
                "rows read one bias. Bind one of the adapters."
            )
        return self.merge(jax.lax.stop_gradient(base))

    def linear(self, x: jax.Array, base: AnyWeight, dropout_key: jax.Array | None) -> jax.Array:
        raise ValueError("a bias is added, no activation is applied to it.")

    def merge(self, base: AnyWeight) -> jax.Array:
        return (dense_float32(base) * self._vector()).astype(base.dtype)

    def unmerge(self, merged: jax.Array) -> jax.Array:
        """As of `Rescaled`."""
        return (merged.astype(jnp.float32) / self._vector()).astype(merged.dtype)

    def trainable(self) -> Self:
        return jax.tree.map(lambda _: False, self)

    def check(self, path: str, base: AnyWeight) -> None:
        require_shape(path, self._vector().shape, base)

    def placement(self, spec: PartitionSpec) -> Self:
        del spec
        return self

    def absent(self) -> Self:
        return self

    def _vector(self) -> jax.Array:
        assert self.source is not None
        return self.source._factor()
