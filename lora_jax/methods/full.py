"""Full fine-tuning as a method: a dense delta for every targeted leaf."""

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from lora_jax.layouts import ENTRIES, Layout
from lora_jax.methods.method import Method
from lora_jax.nodes import Additive, BoundPlain
from lora_jax.products import AnyWeight, Product
from lora_jax.schema import leaf, static


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
class FullNode(BoundPlain, Additive):
    """A dense `delta`, float32, of the weight's own shape."""

    not_by_row = (
        "Full deltas cannot be chosen by row with adapter_ids: each is a whole model. Bind one of "
        "them, or train LoRA adapters."
    )

    delta: jax.Array = leaf("stack", absent=0)
    layout: Layout = static(ENTRIES)

    def branch(self, x: Any, product: Product) -> jax.Array:
        return self.delta
