"""Pairs of answers as examples: for losses of pairs, and judged one by one for KTO."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_jax.data.batches import EncodedSource
from lora_jax.data.encode import encode
from lora_jax.data.packing import Example, answer_pair, length_of, next_token_example
from lora_jax.data.pair_records import SIDES
from lora_jax.data.records import Message, Record
from lora_jax.data.tokenizer import Tokenizer

_logger = logging.getLogger(__name__)
EQUAL, EMPTY, LONG = "with equal answers", "with an empty answer", "longer than the context"


@dataclass(frozen=True, kw_only=True)
class EncodedPairs(EncodedSource):
    """Pairs that fit the context, and of the others how many were skipped for which reason."""

    reasons: Mapping[str, int]


def encode_pairs(source: Iterable[Record], tokenizer: Tokenizer, *, seq_len: int) -> EncodedPairs:
    """Pairs as examples of `[2, n]`: each answer with its prompt, of which the answer counts.

    Skipped, counted and logged are pairs of equal answers, those of which one is empty, and those
    of which one, with the prompt, takes more than `seq_len` inputs.

    Raises:
      ValueError: for a record that is no pair or that the template refuses, or where none is left.
    """
    kept, reasons = _usable(source)
    examples = [
        answer_pair(*(_encoded(index, record["prompt"], record[side], tokenizer) for side in SIDES))
        for index, record in kept
    ]
    return _fitting(examples, reasons, seq_len)


def encode_judged(source: Iterable[Record], tokenizer: Tokenizer, *, seq_len: int) -> EncodedPairs:
    """Pairs as two examples each for `kto_loss`, the chosen answer and the rejected one: each with
    that of the same side to the next prompt beside it, and `desirable`.

    Skips and errors are those of `encode_pairs`; an answer is skipped, too, where the one beside it
    is too long. Of a single pair there is no other prompt: that is an error.
    """
    kept, reasons = _usable(source)
    if len(kept) == 1:
        raise ValueError(
            "A single pair is left, and KTO's baseline needs answers to other prompts."
        )
    examples = []
    for (index, record), (_, following) in zip(kept, [*kept[1:], *kept[:1]], strict=True):
        for side in SIDES:
            both = (
                _encoded(index, record["prompt"], answers[side], tokenizer)
                for answers in (record, following)
            )
            example = answer_pair(*both)
            flag = np.full(len(example["0/tokens"]), side == "chosen")
            examples.append(example | {"desirable": flag})
    return _fitting(examples, reasons, seq_len)


def _usable(source: Iterable[Record]) -> tuple[list[tuple[int, Record]], dict[str, int]]:
    """The records that can train, with their places, and how many cannot, by reason."""
    kept, reasons, index = [], {EQUAL: 0, EMPTY: 0}, -1
    for index, record in enumerate(source):
        if not {"prompt", *SIDES} <= record.keys():
            raise ValueError(
                f"Example {index} is no pair: expected prompt, chosen and rejected, found "
                f"{', '.join(record)}."
            )
        chosen, rejected = ([m["content"].strip() for m in record[side]] for side in SIDES)
        if not chosen[-1] or not rejected[-1]:
            reasons[EMPTY] += 1
        elif chosen == rejected:
            reasons[EQUAL] += 1
        else:
            kept.append((index, record))
    if index < 0:
        raise ValueError("The source holds no examples.")
    return kept, reasons


def _encoded(
    index: int, prompt: Sequence[Message], answer: Sequence[Message], tokenizer: Tokenizer
) -> Example:
    try:
        encoded = encode([*prompt, *answer], tokenizer, first=len(prompt))
    except ValueError as error:
        start = prompt[0]["content"][:40]
        raise ValueError(f"Example {index}, which begins {start!r}: {error}") from error
    return next_token_example(encoded)


def _fitting(examples: list[Example], counts: dict[str, int], seq_len: int) -> EncodedPairs:
    lengths = [length_of(example) for example in examples]
    kept = [e for e, length in zip(examples, lengths, strict=True) if length <= seq_len]
    counts = {**counts, LONG: len(examples) - len(kept)}
    reasons = {reason: count for reason, count in counts.items() if count}
    shown = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    if not kept:
        shortest = f"; the shortest takes {min(lengths)} tokens of {seq_len}" if lengths else ""
        raise ValueError(f"No pair is left to learn from: {shown}{shortest}.")
    if shown:
        _logger.warning("Skipped pairs: %s.", shown)
    return EncodedPairs(examples=kept, skipped=sum(reasons.values()), reasons=reasons)
