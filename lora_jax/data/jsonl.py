"""Any JSONL file of prompts with responses, or of conversations.

A line is `{"prompt": ..., "response": ...}` (`completion` is read as `response`) or
`{"messages": [{"role": ..., "content": ...}, ...]}` with at least one assistant message.
"""

import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

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


def corpus(path: Path) -> Corpus:
    """One file, or a folder's `train.jsonl`, `validation.jsonl` or `valid.jsonl`, `test.jsonl`.

    The last 5 % of the training file, at least one line, are the validation split where no file of
    its own says otherwise. Raises `ValueError` if there is no training file.
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
    splits = {split: partial(_read, file) for split, file in files.items()}
    if VALIDATION not in files:
        for split in (TRAIN, VALIDATION):
            splits[split] = partial(_read_part, files[TRAIN], split)
    fingerprint = file_fingerprint(__file__, *files.values())
    return Corpus(name="jsonl", fingerprint=fingerprint, splits=splits)


def _read_part(path: Path, split: str) -> Iterator[Record]:
    total = sum(1 for _ in numbered_lines(path))
    if total < 2:
        raise ValueError(
            f"{path} has a single example, but one must be held out for validation: add examples, "
            "or put train.jsonl and validation.jsonl into a folder and give its path."
        )
    held_out = total - max(1, total // 20)
    bounds = (0, held_out) if split == TRAIN else (held_out, None)
    return itertools.islice(_read(path), *bounds)


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
    return messages
