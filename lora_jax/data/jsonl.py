"""Any JSONL file of prompts with responses, of conversations, or of pairs of answers.

A line is `{"prompt": ..., "response": ...}` (`completion` is read as `response`) or
`{"messages": [{"role": ..., "content": ...}, ...]}` with at least one assistant message, or a pair,
`{"prompt": ..., "chosen": ..., "rejected": ...}` of texts or of lists of messages.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora_jax.data.pair_records import pair
from lora_jax.data.records import (
    TRAIN,
    VALIDATION,
    Corpus,
    Record,
    conversation,
    file_fingerprint,
    numbered_lines,
)

FILES = {
    "train": ("train.jsonl",),
    "validation": ("validation.jsonl", "valid.jsonl"),
    "test": ("test.jsonl",),
}


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Which lines of a file are its validation split: a share of them, at random by a seed.

    Attributes:
      share: of the lines, above 0 and below 1.
      most: lines at most; `LEAST` are held out at least.
      seed: chooses them.
    """

    share: float
    most: int
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"a validation share of {self.share}: expected one between 0 and 1.")
        if self.most < LEAST:
            raise ValueError(
                f"at most {self.most} validation examples: expected {LEAST} or more, fewer say "
                "nothing."
            )

    def lines(self, total: int, path: Path) -> frozenset[int]:
        """The places of the lines, from 0.

        Raises:
          ValueError: for a file of which these would be more than half.
        """
        count = min(max(LEAST, round(self.share * total)), self.most)
        if 2 * count > total:
            raise ValueError(
                f"{path} has {total} examples, too few to hold {count} of them out for validation: "
                f"expected {2 * LEAST} or more. Add examples, or give validation examples in a "
                "file of their own."
            )
        return frozenset(random.Random(self.seed).sample(range(total), count))


LEAST = 4  # validation examples: the mean of fewer is mostly that of their lengths


def corpus(
    path: Path, *, validation_path: Path | None = None, held_out: HeldOut | None = None
) -> Corpus:
    """One file, or a folder's `train.jsonl`, `validation.jsonl` or `valid.jsonl`, `test.jsonl`.

    The validation split is `validation_path` where given, else the folder's own file, else what
    `held_out` says, else the last 5 % of the training file, at least one line. Raises `ValueError`
    if a file is missing.
    """
    if path.is_dir():
        found = {s: [path / n for n in names if (path / n).exists()] for s, names in FILES.items()}
        files = {split: candidates[0] for split, candidates in found.items() if candidates}
    else:
        files = {TRAIN: path} if path.exists() else {}
    if TRAIN not in files:
        raise ValueError(
            f"No JSONL data at {path}: expected a .jsonl file, or a folder that holds train.jsonl."
        )
    if validation_path is not None:
        if not validation_path.is_file():
            raise ValueError(f"No JSONL validation data at {validation_path}: expected a file.")
        files[VALIDATION] = validation_path
    splits = {split: partial(_read, file) for split, file in files.items()}
    fingerprint = file_fingerprint(__file__, *files.values())
    if VALIDATION not in files:
        for split in (TRAIN, VALIDATION):
            splits[split] = partial(_read_part, files[TRAIN], split, held_out)
        fingerprint = hashlib.sha256(f"{fingerprint} {held_out}".encode()).hexdigest()
    return Corpus(name="jsonl", fingerprint=fingerprint, splits=splits)


def _read_part(path: Path, split: str, held_out: HeldOut | None) -> Iterator[Record]:
    total = sum(1 for _ in numbered_lines(path))
    if held_out is not None:
        validation = held_out.lines(total, path)
    elif total < 2:
        raise ValueError(
            f"{path} has a single example, but one must be held out for validation: add examples, "
            "or put train.jsonl and validation.jsonl into a folder and give its path."
        )
    else:
        validation = frozenset(range(total - max(1, total // 20), total))
    for place, record in enumerate(_read(path)):
        if (place in validation) == (split == VALIDATION):
            yield record


def _read(path: Path) -> Iterator[Record]:
    for number, line in numbered_lines(path):
        try:
            yield _record(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{number}: not valid JSON, column {error.colno}: {error.msg}."
            ) from error
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error


def _record(row: Any) -> Record:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {type(row).__name__}.")
    if "chosen" in row or "rejected" in row:
        return pair(row)
    if "messages" in row:
        return {"messages": _messages(row["messages"])}
    response = row.get("response", row.get("completion"))
    if not isinstance(row.get("prompt"), str) or not isinstance(response, str):
        raise ValueError(
            "expected the strings `prompt` and `response` (or `completion`), or a list `messages`, "
            f"found the keys {sorted(row)}."
        )
    if not response.strip():
        raise ValueError("the response is empty: there is nothing to learn from this line.")
    return conversation(row["prompt"], response)


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list):
        raise ValueError(f"expected `messages` to be a list, found {type(messages).__name__}.")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(
                f"messages[{index}] must be an object with the strings `role` and `content`."
            )
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message has the role `assistant`: there is nothing to learn from.")
    for index, message in enumerate(messages):
        silent = not message["content"].strip() and not message.get("tool_calls")
        if message["role"] == "assistant" and silent:
            raise ValueError(
                f"messages[{index}], the assistant's, is empty: there is nothing to learn from it."
            )
    return messages
