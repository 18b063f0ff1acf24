"""Full fine-tuning, as just another method: a dense delta for every targeted leaf."""

import dataclasses
from typing import Any, ClassVar, Self, cast

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lora_jax.layouts import Layout
from lora_jax.methods.base import Additive, AnyWeight, Method, require_shape
from lora_jax.weights import Shared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Method):
    """`w + d` with a dense float32 `d`, zero at the start; adapts leaves of any shape.

    Training it is training the weight, with float32 accumulation even over a bf16 base.
    `targets=".*"` tunes a whole model.
    """

    needs_matrix: ClassVar[bool] = False

    def fresh(self, weight: AnyWeight, *, layout: Layout, key: jax.Array) -> "DenseDelta":
        del layout, key
        return DenseDelta(delta=jnp.zeros(weight.shape, jnp.float32))


@flax.struct.dataclass
class DenseDelta(Additive):
    """A dense `delta`, float32, of the weight's own shape.

    It is bound as the plain sum, since a model may read a norm's scale in any way it likes.
    """

    delta: jax.Array
    stack_ndim: ClassVar[int] = 0

    def update(self, shape: tuple[int, ...]) -> jax.Array:
        return self.delta.reshape(shape)

    def bind(
        self, base: AnyWeight, dropout_key: jax.Array | None, adapter_ids: Shared | None
    ) -> AnyWeight:
        del dropout_key
        if adapter_ids is not None:
            raise ValueError(
                "Full deltas cannot be chosen by row with adapter_ids: each is a whole model. "
                "Bind one of them, or train LoRA adapters."
            )
        return self.merge(jax.lax.stop_gradient(base))

    def linear(self, x: jax.Array, base: AnyWeight, dropout_key: jax.Array | None) -> jax.Array:
        del dropout_key
        return jnp.matmul(x, self.merge(base))

    def placement(self, spec: PartitionSpec) -> "DenseDelta":
        return dataclasses.replace(self, delta=cast(Any, spec))

    def trainable(self) -> Self:
        return dataclasses.replace(cast(Any, self), delta=True)

    def check(self, path: str, base: AnyWeight) -> None:
        require_shape(path, self.delta.shape, base)

    def absent(self) -> Self:
        return dataclasses.replace(self, delta=jnp.zeros_like(self.delta))
