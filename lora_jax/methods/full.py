"""Full fine-tuning as a method: a dense delta for every targeted leaf."""

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from lora_jax.layouts import ENTRIES, Layout
from lora_jax.methods.method import Method
from lora_jax.nodes import Additive
from lora_jax.products import AnyWeight, Product
from lora_jax.schema import leaf, static
from lora_jax.weights import Shared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Method):
    """`w + d` with a dense float32 `d`, initialised as zero; adapts leaves of any shape.

    Training it is training the weight, with float32 accumulation even over a bf16 base.
    `targets=".*"` tunes a whole model.
    """

    needs_matrix: ClassVar[bool] = False

    def init_node(
        self, path: str, weight: AnyWeight, *, layout: Layout, key: jax.Array
    ) -> "FullNode":
        del path, layout, key
        return FullNode(delta=jnp.zeros(weight.shape, jnp.float32))


@flax.struct.dataclass
class FullNode(Additive):
    """A dense `delta`, float32, of the weight's own shape.

    It is bound as the plain sum, since a model may use a norm's scale in any way.
    """

    delta: jax.Array = leaf("stack", absent=0)
    layout: Layout = static(ENTRIES)

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

    def branch(self, x: Any, product: Product) -> jax.Array:
        return self.delta
