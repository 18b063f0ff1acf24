"""Models as pure functions over a params tree: one file a family, over shared blocks."""

from lora_jax.models.config import DecoderConfig as DecoderConfig
from lora_jax.models.decoder import forward as forward
from lora_jax.models.decoder import hidden_states as hidden_states
from lora_jax.models.decoder import init as init
from lora_jax.models.decoder import output_head as output_head
from lora_jax.models.families import FAMILIES as FAMILIES
from lora_jax.models.families import SHAPES as SHAPES
from lora_jax.models.family import SHARDING as SHARDING
from lora_jax.models.family import Family as Family
from lora_jax.models.family import Parameter as Parameter
from lora_jax.models.family import Params as Params
from lora_jax.models.tying import untie as untie
