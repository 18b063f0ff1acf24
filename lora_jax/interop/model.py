"""The model that every loader returns."""

import dataclasses

from lora_jax.data.tokenizer import Tokenizer
from lora_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A pretrained model: its params tree, its shape, its tokenizer, and its source.

    `source` is the path the weights were read from; write it into a run's records, since two
    sources of one `name` may hold differently rounded weights.
    """

    params: dict
    config: DecoderConfig
    tokenizer: Tokenizer
    name: str
    source: str
