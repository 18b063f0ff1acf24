"""Records as the examples of a loss, by the name of the batches that it takes."""

from collections.abc import Callable, Iterable
from typing import Any

from lora_jax import data

Encode = Callable[..., data.EncodedSource]  # (records, tokenizer, *, seq_len)


def conversation(record: data.Record) -> list[dict[str, Any]]:
    """The messages of a record; of a pair of answers, the prompt with the chosen one."""
    if "messages" in record:
        return list(record["messages"])
    return [*record["prompt"], *record["chosen"]]


def encode_conversations(
    records: Iterable[data.Record], tokenizer: data.Tokenizer, *, seq_len: int
) -> data.EncodedSource:
    """`encode_source`, to which a pair is its chosen answer: supervised tuning on preferences."""
    messages = ({"messages": conversation(record)} for record in records)
    return data.encode_source(messages, tokenizer, seq_len=seq_len)


ENCODE: dict[str, Encode] = {
    "next-token": encode_conversations,
    "preference": data.encode_pairs,
    "judged": data.encode_judged,
}
