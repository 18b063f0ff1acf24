"""Any dataset of the TFDS catalogue, as conversations or pairs of answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from lora_jax.data.pair_records import pair
from lora_jax.data.records import Record, conversation


@dataclass(frozen=True, kw_only=True)
class ExternalRecords(Sequence[Record]):
    """Rows of a TFDS split, by what their fields are to a record: `prompt` and `response`, or
    `chosen` and `rejected` with or without `prompt`."""

    rows: Sequence[dict[str, Any]]
    fields: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        place = range(len(self))[index]
        row = self.rows[place]
        values = {what: row[field] for what, field in self.fields.items()}
        if "response" in values:
            return conversation(_text(values["prompt"]), _text(values["response"]))
        try:
            return pair({what: _text_or_messages(value) for what, value in values.items()})
        except ValueError as error:
            raise ValueError(f"row {place}: {error}") from error


def open_external(
    name: str, split: str, cache_dir: Path, fields: Mapping[str, str | None]
) -> ExternalRecords:
    """A split of the TFDS dataset `name`, downloaded into `cache_dir` the first time.

    `fields` has those of the dataset, or None, for `prompt`, `response`, `chosen` and `rejected`.
    Raises `ValueError` if the dataset cannot be had, or lacks a field of that name.
    """
    given = {what: field for what, field in fields.items() if field is not None}
    if given.keys() - {"prompt"} not in ({"chosen", "rejected"}, {"response"}) or (
        "response" in given and "prompt" not in given
    ):
        raise ValueError(
            f"tfds:{name} needs prompt_field and response_field, the names of two of its fields, "
            "or of pairs chosen_field and rejected_field, with prompt_field where these are "
            "answers alone."
        )
    try:
        rows: Any = tfds.data_source(name, split=split, data_dir=cache_dir / "tfds-catalogue")
    except Exception as error:  # whatever a dataset's own script or the network raises
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"Cannot read tfds:{name}, split {split}: {type(error).__name__}: {reason} Check the "
            "name at https://www.tensorflow.org/datasets/catalog, the network, and that any module "
            "named here is installed; or export the data elsewhere as JSONL lines with prompt and "
            "response and use source jsonl."
        ) from error
    for field in given.values():
        if field not in rows[0]:
            raise ValueError(f"tfds:{name} has no field {field!r}; its fields: {sorted(rows[0])}.")
    return ExternalRecords(rows=rows, fields=given)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _text_or_messages(value: Any) -> str | list[dict[str, str]]:
    """Messages are a sequence of mappings, or, as TFDS stores them, a mapping of sequences."""
    if isinstance(value, str | bytes):
        return _text(value)
    if isinstance(value, Mapping):
        columns = {key: list(column) for key, column in value.items()}
        value = [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
    return [{key: _text(entry) for key, entry in message.items()} for message in value]
