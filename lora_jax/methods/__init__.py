"""One file a method; the protocol is in `base`."""

from lora_jax.methods.adalora import AdaLoRA as AdaLoRA
from lora_jax.methods.adalora import Triplets as Triplets
from lora_jax.methods.adalora import allocate_budget as allocate_budget
from lora_jax.methods.adalora import orthogonality as orthogonality
from lora_jax.methods.base import Additive as Additive
from lora_jax.methods.base import DeltaNode as DeltaNode
from lora_jax.methods.base import Extra as Extra
from lora_jax.methods.base import Method as Method
from lora_jax.methods.dora import DecomposedLowRank as DecomposedLowRank
from lora_jax.methods.dora import DoRA as DoRA
from lora_jax.methods.full import DenseDelta as DenseDelta
from lora_jax.methods.full import Full as Full
from lora_jax.methods.ia3 import IA3 as IA3
from lora_jax.methods.ia3 import Rescaled as Rescaled
from lora_jax.methods.lora import LoRA as LoRA
from lora_jax.methods.lora import LowRank as LowRank
from lora_jax.methods.prefix import EncodedKeyValues as EncodedKeyValues
from lora_jax.methods.prefix import KeyValues as KeyValues
from lora_jax.methods.prefix import Prefix as Prefix
from lora_jax.methods.prompt import Prompt as Prompt
from lora_jax.methods.prompt import SoftPrompt as SoftPrompt
from lora_jax.methods.vera import Projection as Projection
from lora_jax.methods.vera import SharedLowRank as SharedLowRank
from lora_jax.methods.vera import VeRA as VeRA
