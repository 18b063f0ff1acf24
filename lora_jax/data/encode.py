"""Conversations to token ids, with the mask of what the assistant wrote."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax.data.chat import render
from lora_jax.data.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Encoded:
    """tokens int32 [n], loss_mask bool [n]: true at the tokens that a model learns to write."""

    tokens: np.ndarray
    loss_mask: np.ndarray


def render_messages(
    messages: Messages,
    tokenizer: Tokenizer,
    template: str | None = None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """`messages` through `template`, by default the tokenizer's own.

    Raises `ValueError` if there is no template, or if it fails.
    """
    template = template or tokenizer.chat_template
    if template is None:
        raise ValueError("The tokenizer has no chat template: pass one as `template`.")
    special = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    return render(
        template,
        messages,
        add_generation_prompt=add_generation_prompt,
        **{name: token for name, token in special.items() if token is not None},
    )


def encode(
    messages: Messages, tokenizer: Tokenizer, template: str | None = None, *, first: int = 0
) -> Encoded:
    """Tokens of the full conversation; the loss counts every assistant turn from message `first`
    on and nothing else.

    A turn runs from the end of the generation prompt to the end-of-turn token that the template
    puts after the message.

    Raises:
      ValueError: there is no assistant message or nothing in it, there is no template or it fails,
        or it rewrites earlier turns, so that the beginning of a turn is not known.
    """
    text = render_messages(messages, tokenizer, template)
    ids, offsets = tokenizer.encode_with_offsets(text)
    starts = np.array([start for start, _ in offsets], np.int64)
    mask = np.zeros(len(ids), bool)
    for start, stop in _assistant_spans(messages, text, tokenizer, template, first):
        mask |= (starts >= start) & (starts < stop)
    if not mask.any():
        raise ValueError(
            "Nothing to learn from this conversation: it has no assistant message with content."
        )
    return Encoded(tokens=np.array(ids, np.int32), loss_mask=mask)


def _assistant_spans(
    messages: Messages, text: str, tokenizer: Tokenizer, template: str | None, first: int
) -> list[tuple[int, int]]:
    spans = []
    for index, message in enumerate(messages):
        if index < first or message["role"] != "assistant":
            continue
        prompt = render_messages(messages[:index], tokenizer, template, add_generation_prompt=True)
        last = index == len(messages) - 1
        turn = text if last else render_messages(messages[: index + 1], tokenizer, template)
        for part in (prompt, turn):
            _check_prefix(part, text, index)
        spans.append((len(prompt), len(prompt) + _turn_length(turn[len(prompt) :], message)))
    return spans


def _turn_length(turn: str, message: Mapping[str, Any]) -> int:
    """Leaves out the white space after an end-of-turn token, which a model never writes."""
    content = message["content"].strip()
    behind = turn[turn.find(content) + len(content) :]
    return len(turn.rstrip()) if behind.strip() else len(turn)


def _check_prefix(part: str, text: str, index: int) -> None:
    if not text.startswith(part):
        at = len(os.path.commonprefix((part, text)))  # noqa: RUF071
        raise ValueError(
            f"The chat template writes what precedes the end of message {index} differently once "
            f"the rest follows: {part[at : at + 30]!r} becomes {text[at : at + 30]!r} at character "
            f"{at}, so the response cannot be told from the prompt. Use a template that appends."
        )
