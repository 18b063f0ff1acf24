"""Many requests, each with an adapter of its own, answered in one running batch."""

from lora_jax.serving.engine import Engine as Engine
from lora_jax.serving.request import Event as Event
from lora_jax.serving.request import Refused as Refused
from lora_jax.serving.request import Request as Request
from lora_jax.serving.request import Sampling as Sampling
from lora_jax.serving.request import TokenLogprobs as TokenLogprobs
