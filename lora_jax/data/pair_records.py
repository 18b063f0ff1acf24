"""A record of a preference: a prompt, a chosen answer and a rejected one, as conversations.

It is `{"prompt": [messages], "chosen": [messages], "rejected": [messages]}`; sources give it as
text, as messages, or as full conversations whose common beginning is the prompt.
"""

from collections.abc import Mapping
from typing import Any

from lora_jax.data.records import Message, Record

SIDES = ("chosen", "rejected")


def pair(row: Mapping[str, Any]) -> Record:
    """The record of a row with `chosen` and `rejected`, texts or lists of messages, and `prompt`,
    which full conversations need not have.

    Raises:
      ValueError: for sides that are neither, have no prompt, or another one than it says.
    """
    sides = [_messages(side, row.get(side), "assistant") for side in SIDES]
    if row.get("prompt") is None:
        prompt = _common_start(*sides)
        answers = [side[len(prompt) :] for side in sides]
    else:
        prompt = _messages("prompt", row["prompt"], "user")
        answers = [_behind(prompt, name, side) for name, side in zip(SIDES, sides, strict=True)]
    if not prompt:
        raise ValueError(
            "no prompt: expected `prompt`, or `chosen` and `rejected` as conversations that begin "
            "with the same messages."
        )
    for name, answer in zip(SIDES, answers, strict=True):
        if not answer or answer[-1]["role"] != "assistant":
            raise ValueError(f"`{name}` does not end with a message of the role `assistant`.")
    return {"prompt": prompt, **dict(zip(SIDES, answers, strict=True))}


def _common_start(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The messages that both begin with; the last is an answer, also where both are the same."""
    count = 0
    for ours, theirs in zip(chosen[:-1], rejected[:-1], strict=False):
        if ours != theirs:
            break
        count += 1
    return chosen[:count]


def _messages(name: str, value: Any, role: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"expected `{name}` to be text or a list of messages, found {type(value).__name__}."
        )
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(
                f"{name}[{index}] must be an object with the strings `role` and `content`."
            )
    return value


def _behind(prompt: list[Message], name: str, side: list[Message]) -> list[Message]:
    """What follows the prompt in a side that repeats it, or a side that does not."""
    if side[0]["role"] == "assistant":
        return side
    if side[: len(prompt)] != prompt:
        raise ValueError(f"`{name}` is a conversation that does not begin with `prompt`.")
    return side[len(prompt) :]
