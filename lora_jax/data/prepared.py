"""Corpora written once as array_record through TFDS, and read back at random. No TensorFlow.

A prepared corpus lives in a folder named after its fingerprint, so it can never be stale. The
folder appears by one rename: a process that is killed leaves none, and of two that prepare the same
corpus at once the first wins.
"""

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import tensorflow_datasets as tfds

from lora_jax.data.records import Corpus, Record

# Part of every folder's name: raise it when what is stored changes.
_LAYOUT = 1
_READ_AHEAD = 1024


@dataclass(frozen=True)
class PreparedRecords(Sequence[Record]):
    """The records of one split, decoded when they are read. `rows` is a TFDS data source."""

    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            rows = self.rows.__getitems__(range(len(self))[index])
            return [json.loads(row["record"]) for row in rows]
        return self[index : index + 1 or None][0]

    def __iter__(self) -> Iterator[Record]:
        # Rows are compressed in groups: one at a time costs ten times as much.
        for start in range(0, len(self), _READ_AHEAD):
            yield from self[start : start + _READ_AHEAD]


def open_split(corpus: Corpus, split: str, cache_dir: Path) -> PreparedRecords:
    """One split of `corpus`, prepared under `cache_dir` if it is not there yet."""
    folder = cache_dir / "tfds" / f"{corpus.name}-{_LAYOUT}-{corpus.fingerprint[:24]}"
    if not folder.exists():
        _prepare(corpus, folder)
    with _quiet():
        builder: Any = tfds.builder_from_directory(folder)
        rows = builder.as_data_source(split=split)
    return PreparedRecords(rows)


def _prepare(corpus: Corpus, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".preparing-") as scratch:
        builder = _Records(corpus.splits, data_dir=scratch, file_format="array_record")
        with _quiet():
            builder.download_and_prepare()
        try:
            os.rename(builder.data_dir, folder)
        except OSError:
            if not folder.exists():
                raise


class _Records(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore
    """Stores each record as one JSON text, whatever keys its messages have."""

    name = "records"
    VERSION = tfds.core.Version("1.0.0")
    # TFDS looks for checksums of downloads beside this file, with a package it does not require.
    code_path = None

    def __init__(
        self, splits: Mapping[str, Callable[[], Iterable[Record]]], **builder_options: Any
    ) -> None:
        self._splits = splits
        super().__init__(**builder_options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"record": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(read()) for split, read in self._splits.items()}

    def _generate_examples(self, records: Iterable[Record]) -> Iterator[tuple[int, dict[str, str]]]:
        for index, record in enumerate(records):
            yield index, {"record": json.dumps(record, ensure_ascii=False)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # TFDS reports by print and tqdm; errors are raised, so nothing is lost here.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
