"""The shapes of batches that an engine compiles: few, so that all are compiled at start."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_jax.serving.bank import Place
from lora_jax.serving.sampling import RowSampling
from lora_jax.serving.scheduler import Limits, Work
from lora_jax.serving.scheduler import Sequence as Reading
from lora_jax.serving.steps import Batch

# Smaller shapes cost too little less for a program of their own, but for a single row.
_FEWEST_POSITIONS, _FEWEST_ROWS = 128, 4


@dataclasses.dataclass(frozen=True, order=True)
class Shape:
    """Rows, tokens of each, pages of keys and values, and pages of an adapter."""

    rows: int
    tokens: int
    columns: int
    width: int


def all_shapes(limits: Limits, max_length: int, widths: Sequence[int]) -> list[Shape]:
    """Every shape that `shape_of` returns."""
    columns = _columns(limits, max_length)
    batches = [(rows, limits.chunk) for rows in _rows(limits, is_chunk=True)]
    batches += [(rows, 1) for rows in _rows(limits, is_chunk=False)]
    return [Shape(*batch, c, w) for batch in batches for c in columns for w in widths]


def shape_of(work: Work, limits: Limits, max_length: int, widths: Sequence[int]) -> Shape:
    """The smallest that holds a step."""
    columns = max(-(-(s.read + count) // limits.page_size) for s, count in work.counts)
    width = max(len(_place(s).pages) for s, _ in work.counts)
    return Shape(
        _least(_rows(limits, work.is_chunk), len(work.counts)),
        limits.chunk if work.is_chunk else 1,
        _least(_columns(limits, max_length), columns),
        _least(widths, width),
    )


def empty_batch(shape: Shape) -> Batch:
    """Idle rows, as NumPy arrays."""
    rows = shape.rows
    return Batch(
        tokens=_filled(0, rows, shape.tokens),
        counts=_filled(0, rows),
        lengths=_filled(0, rows),
        table=_filled(0, rows, shape.columns),
        adapter_pages=_filled(-1, rows, shape.width),
        adapter_slots=_filled(-1, rows),
    )


def empty_sampling(rows: int) -> RowSampling:
    """The settings of rows that take the most likely token, as NumPy arrays."""
    return RowSampling(
        temperature=_filled(0, rows, dtype=np.float32),
        top_p=_filled(1, rows, dtype=np.float32),
        top_k=_filled(0, rows),
        seed=_filled(0, rows, 2, dtype=np.uint32),
        step=_filled(0, rows),
        logprobs=_filled(False, rows, dtype=bool),
    )


def _filled(value: int, *shape: int, dtype: Any = np.int32) -> Any:
    return np.full(shape, value, dtype)


def batch_of(work: Work, shape: Shape) -> Batch:
    """The batch of a step, as NumPy arrays of a shape."""
    batch = empty_batch(shape)
    for row, (sequence, count) in enumerate(work.counts):
        read, place = sequence.read, _place(sequence)
        pages = sequence.pages[: shape.columns]
        batch.tokens[row, :count] = sequence.tokens[read : read + count]
        batch.counts[row], batch.lengths[row] = count, read
        batch.table[row, : len(pages)] = pages
        batch.adapter_pages[row, : len(place.pages)] = place.pages
        batch.adapter_slots[row] = place.slot
    return batch


def sampling_of(work: Work, rows: int) -> RowSampling:
    """The settings of the rows of a step, as NumPy arrays for so many rows."""
    how = empty_sampling(rows)
    for row, (sequence, _) in enumerate(work.counts):
        given = sequence.request.sampling
        how.temperature[row], how.top_p[row] = given.temperature, given.top_p
        how.top_k[row], how.step[row] = given.top_k, sequence.answered
        how.seed[row] = [given.seed >> 32 & 0xFFFFFFFF, given.seed & 0xFFFFFFFF]
        how.logprobs[row] = sequence.request.logprobs is not None
    return how


def _rows(limits: Limits, is_chunk: bool) -> list[int]:
    if is_chunk:
        return sorted({1, limits.readers})
    return sorted({1, *_doubled(_FEWEST_ROWS, limits.rows)})


def _columns(limits: Limits, max_length: int) -> list[int]:
    fewest = max(1, _FEWEST_POSITIONS // limits.page_size)
    return _doubled(fewest, -(-max_length // limits.page_size))


def _doubled(first: int, last: int) -> list[int]:
    """first, twice that, and so on, and `last`."""
    sizes = [min(first, last)]
    while sizes[-1] < last:
        sizes.append(min(2 * sizes[-1], last))
    return sizes


def _least(sizes: Sequence[int], wanted: int) -> int:
    return next(size for size in sizes if size >= wanted)


def _place(sequence: Reading) -> Place:
    assert sequence.lease is not None
    return sequence.lease.place
