"""The types that every source returns: records, and a corpus of them in named splits."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = dict[str, Any]
Record = dict[str, list[Message]]

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A named collection of records that can be produced split by split.

    `fingerprint` changes whenever the records may have changed; `splits` maps a split's name to a
    function that yields its records in order.
    """

    name: str
    fingerprint: str
    splits: Mapping[str, Callable[[], Iterable[Record]]]


def conversation(prompt: str, response: str, *, system: str | None = None) -> Record:
    """A record of one question and one answer, after an optional system message."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages}


def file_fingerprint(*paths: str | os.PathLike[str]) -> str:
    """SHA-256 of the files' names and bytes, in order.

    A reader includes its own source file: once edited, it must not serve what it prepared before.
    """
    digest = hashlib.sha256()
    for path in map(Path, paths):
        content = hashlib.sha256(path.read_bytes()).digest()
        digest.update(path.name.encode() + b"\0" + content)
    return digest.hexdigest()


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The non-blank lines of a UTF-8 file, stripped, with their numbers from 1.

    Raises `ValueError` if the file is not UTF-8 or holds no such line.
    """
    empty = True
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line := line.strip():
                    empty = False
                    yield number, line
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 text ({error.reason}): save it as UTF-8."
            ) from error
    if empty:
        raise ValueError(f"{path} is empty: expected at least one example, one on each line.")
