"""The E2E restaurant corpus, read from a folder.

The files list the references of one meaning representation one after another. The validation split
yields a first reference of each, then a second, so that its beginning is a sample of all.

Two layouts exist: the LoRA paper's `train.txt`, `valid.txt`, `test.txt` with lines `MR||reference`,
and the challenge's `trainset.csv`, `devset.csv`, `testset_w_refs.csv` with columns `mr` and `ref`.
"""

import csv
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from lora_jax.data.records import (
    SPLITS,
    VALIDATION,
    Corpus,
    Record,
    conversation,
    file_fingerprint,
    numbered_lines,
)
from lora_jax.data.restaurants import SYSTEM

TEXT_FILES = ("train.txt", "valid.txt", "test.txt")
CSV_FILES = ("trainset.csv", "devset.csv", "testset_w_refs.csv")


def corpus(folder: Path) -> Corpus:
    """The splits whose files `folder` holds. Raises `ValueError` if it holds no training file."""
    for names, read in ((TEXT_FILES, _read_text), (CSV_FILES, _read_csv)):
        files = {s: folder / n for s, n in zip(SPLITS, names, strict=True) if (folder / n).exists()}
        if "train" in files:
            return Corpus(
                name="e2e",
                fingerprint=file_fingerprint(__file__, *files.values()),
                splits={split: partial(_split, split, read, file) for split, file in files.items()},
            )
    raise ValueError(
        f"No E2E data in {folder}: expected a folder with {', '.join(TEXT_FILES)} "
        f"(lines `MR||reference`) or {', '.join(CSV_FILES)} (columns mr and ref)."
    )


def _split(name: str, read: Callable[[Path], Iterator[Record]], path: Path) -> Iterator[Record]:
    return _interleaved(read(path)) if name == VALIDATION else read(path)


def _interleaved(records: Iterable[Record]) -> Iterator[Record]:
    """By turns from each meaning representation."""
    by_meaning: dict[str, list[Record]] = {}
    for record in records:
        by_meaning.setdefault(record["messages"][-2]["content"], []).append(record)
    for turn in itertools.zip_longest(*by_meaning.values()):
        yield from (record for record in turn if record is not None)


def _read_text(path: Path) -> Iterator[Record]:
    for number, line in numbered_lines(path):
        meaning, separator, reference = line.partition("||")
        if not separator:
            raise ValueError(f"{path}:{number}: expected `MR||reference`, found no `||`.")
        yield _record(meaning, reference, where=f"{path}:{number}")


def _read_csv(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        if not {"mr", "ref"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{path}:1: expected the columns mr and ref, found {rows.fieldnames}.")
        row = None
        for row in rows:
            yield _record(row["mr"], row["ref"], where=f"{path}:{rows.line_num}")
        if row is None:
            raise ValueError(f"{path} is empty: it has a header but no row below it.")


def _record(meaning: str | None, reference: str | None, *, where: str) -> Record:
    meaning, reference = (meaning or "").strip(), (reference or "").strip()
    if not meaning or not reference:
        missing = "reference" if meaning else "meaning representation"
        raise ValueError(f"{where}: the {missing} is empty; complete the line or remove it.")
    return conversation(meaning, reference, system=SYSTEM)
