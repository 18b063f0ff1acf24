"""One file a method; the protocol is in `base`."""

from lora_jax.methods.base import Additive as Additive
from lora_jax.methods.base import DeltaNode as DeltaNode
from lora_jax.methods.base import Extra as Extra
from lora_jax.methods.base import Method as Method
from lora_jax.methods.dora import DecomposedLowRank as DecomposedLowRank
from lora_jax.methods.dora import DoRA as DoRA
from lora_jax.methods.full import DenseDelta as DenseDelta
from lora_jax.methods.full import Full as Full
from lora_jax.methods.lora import LoRA as LoRA
from lora_jax.methods.lora import LowRank as LowRank
