"""What a model says of each meaning representation, and what people said of it."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

import lora_jax as lora
from lora_jax import data
from lora_jax.interop import Pretrained
from lora_jax.models.generate import NONE, generate
from lora_jax.parallel import hosts
from lora_jax.transform import Delta

_generate = jax.jit(generate, static_argnames=("config", "max_new_tokens", "eos_id"))


class Items(NamedTuple):
    """Distinct meaning representations in the order of their first record, and all references of
    each."""

    meanings: list[str]
    references: list[list[str]]


def grouped(records: Iterable[data.Record]) -> Items:
    """The records by meaning representation, which E2E's test split has 630 of in 4,693 records.

    Raises:
      ValueError: there are none, or one does not end in a question and its answer.
    """
    references: dict[str, list[str]] = {}
    for i, record in enumerate(records):
        messages = record["messages"]
        if [message["role"] for message in messages[-2:]] != ["user", "assistant"]:
            raise ValueError(f"record {i} does not end with a user's message and its answer.")
        meaning, reference = (message["content"] for message in messages[-2:])
        references.setdefault(meaning, []).append(reference)
    if not references:
        raise ValueError("there are no records to group by meaning representation.")
    return Items(list(references), list(references.values()))


def answers(
    model: Pretrained,
    delta: Delta,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
) -> list[str]:
    """The answer to each of `prompts`, taken as they are, by the model with `delta` ({}: the base).

    Answers are greedy, where the LoRA paper's are of a beam of 10 (length penalty 0.8, no 4-gram
    twice): a score says which. As there, an answer has at most 64 tokens and ends before an empty
    line. All batches are one compiled program: the last is filled up.

    Raises:
      ValueError: no prompts, one without tokens or longer than the context allows, or logits that
        are not numbers.
    """
    rows = [model.tokenizer.encode(prompt) for prompt in prompts]
    _check(rows, model, max_new_tokens)
    eos_id, width = model.tokenizer.eos_id, max(map(len, rows))
    batch_size = min(batch_size, len(rows))
    weights = lora.bind(model.params, delta)
    said: list[str] = []
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        filled = batch + batch[-1:] * (batch_size - len(batch))
        tokens = _generate(
            weights,
            np.array([row + [eos_id] * (width - len(row)) for row in filled], np.int32),
            np.array([len(row) for row in filled], np.int32),
            config=model.config,
            max_new_tokens=max_new_tokens,
            eos_id=eos_id,
        )
        new = hosts.gathered(tokens).tolist()[: len(batch)]
        said += [_text(model, row, first + i) for i, row in enumerate(new)]
    return said


def _text(model: Pretrained, tokens: list[int], i: int) -> str:
    if NONE in tokens:
        raise ValueError(f"the model's logits after prompt {i} are not numbers: it has no answer.")
    text = model.tokenizer.decode(tokens, skip_special_tokens=True)
    return text.split("\n\n")[0].strip()


def _check(rows: Sequence[Sequence[int]], model: Pretrained, max_new_tokens: int) -> None:
    if not rows:
        raise ValueError("there are no prompts to answer.")
    room = model.config.context_length - max_new_tokens
    for i, row in enumerate(rows):
        if not 0 < len(row) <= room:
            raise ValueError(
                f"prompt {i} has {len(row)} tokens: expected 1 to {room}, the context of "
                f"{model.config.context_length} less max_new_tokens={max_new_tokens}."
            )
