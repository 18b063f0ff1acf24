"""What losses of language models read: a model's last hidden states and its output head."""

from collections.abc import Callable
from typing import Any

import jax

from lora_jax.kernels.attention import Implementation
from lora_jax.models import DecoderConfig, hidden_states, output_head
from lora_jax.models.remat import Remat
from lora_jax.weights import PyTree

# (weights, a batch of [B, T] arrays) to (hidden states [B, T, D], output head [D, V])
FinalStates = Callable[[PyTree, Any], tuple[jax.Array, Any]]


def final_states(
    config: DecoderConfig,
    *,
    remat: Remat,
    unroll: int,
    attention: Implementation | None,
) -> FinalStates:
    """The function that reads `tokens`, `segment_ids` and `positions [B, T]` of a batch; the
    keywords are those of `hidden_states`."""

    def read(weights, batch):
        hidden = hidden_states(
            weights,
            batch["tokens"],
            config,
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            remat=remat,
            unroll=unroll,
            attention=attention,
        )
        return hidden, output_head(weights)

    return read


def read_out_of(config: DecoderConfig) -> Callable[[jax.Array, Any], jax.Array]:
    """The family's product with the output head, `(rows [..., D], head) -> logits [..., V]`."""

    def read_out(rows, head):
        return config.family.read_out(rows, head, config)

    return read_out
