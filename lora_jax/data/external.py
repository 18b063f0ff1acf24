"""Any dataset of the TFDS catalogue, as conversations."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from lora_jax.data.records import Record, conversation


@dataclass(frozen=True, kw_only=True)
class ExternalRecords(Sequence[Record]):
    """Rows of a TFDS split, one field of which is the prompt and another the response."""

    rows: Sequence[dict[str, Any]]
    prompt_field: str
    response_field: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        row = self.rows[range(len(self))[index]]
        return conversation(_text(row[self.prompt_field]), _text(row[self.response_field]))


def open_external(
    name: str, split: str, cache_dir: Path, *, prompt_field: str | None, response_field: str | None
) -> ExternalRecords:
    """A split of the TFDS dataset `name`, downloaded into `cache_dir` the first time.

    Raises `ValueError` if the dataset cannot be had, or lacks a field of that name.
    """
    if prompt_field is None or response_field is None:
        raise ValueError(
            f"tfds:{name} needs prompt_field and response_field, the names of two of its fields."
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
    for field in (prompt_field, response_field):
        if field not in rows[0]:
            raise ValueError(f"tfds:{name} has no field {field!r}; its fields: {sorted(rows[0])}.")
    return ExternalRecords(rows=rows, prompt_field=prompt_field, response_field=response_field)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
