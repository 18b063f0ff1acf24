"""Batches of fixed shape from a source of conversations.

A batch holds tokens, targets, segment_ids, positions (int32) and loss_mask (bool), all [B, T], or
[B, 2, T] of pairs, and whatever other fields its examples have; `targets` is the next token of the
same example, `loss_mask` is true where it counts, `segment_ids` number a row's examples from 1 with
0 for padding, and `positions` restart in each of them.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from lora_jax.data.encode import encode
from lora_jax.data.packing import Batch, Example, length_of, next_token_example, pack_rows
from lora_jax.data.records import Record
from lora_jax.data.tokenizer import Tokenizer

_logger = logging.getLogger(__name__)
AHEAD = 2  # batches that are placed ahead of their step
# The examples are in memory: threads that read ahead would only cost time.
_IN_MEMORY = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


@dataclass(frozen=True, kw_only=True)
class EncodedSource:
    """The examples of a source that fit the context, and how many did not."""

    examples: Sequence[Example]
    skipped: int


def encode_source(source: Iterable[Record], tokenizer: Tokenizer, *, seq_len: int) -> EncodedSource:
    """Encodes every record; those of more than `seq_len` inputs are skipped, counted and logged.

    Raises:
      ValueError: a record cannot be encoded, or none fits.
    """
    examples = encode_records(source, tokenizer)
    encoded = fitting(examples, seq_len)
    if encoded.skipped:
        _logger.warning(
            "Skipped %d of %d examples, longer than the context of %d tokens (the longest: %d).",
            encoded.skipped,
            len(examples),
            seq_len,
            max(len(example["tokens"]) for example in examples),
        )
    return encoded


def encode_records(source: Iterable[Record], tokenizer: Tokenizer) -> list[Example]:
    """Encodes every record, of any length.

    Raises:
      ValueError: one cannot be encoded, or there is none.
    """
    examples = []
    for index, record in enumerate(source):
        if "messages" not in record:
            raise ValueError(
                f"Example {index} is no conversation but holds {', '.join(record)}: pairs are "
                "encoded by encode_pairs, for a loss of preferences."
            )
        try:
            examples.append(next_token_example(encode(record["messages"], tokenizer)))
        except ValueError as error:
            start = str(record["messages"][0].get("content"))[:40] if record["messages"] else ""
            raise ValueError(f"Example {index}, which begins {start!r}: {error}") from error
    if not examples:
        raise ValueError("The source holds no examples.")
    return examples


def fitting(examples: Sequence[Example], seq_len: int) -> EncodedSource:
    """Those of at most `seq_len` inputs; the others are counted.

    Raises:
      ValueError: none fits.
    """
    lengths = [length_of(example) for example in examples]
    if min(lengths) > seq_len:
        raise ValueError(
            f"None of the {len(lengths)} examples fits a context of {seq_len} tokens; the shortest "
            f"takes {min(lengths)}, the longest {max(lengths)}: raise seq_len."
        )
    kept = [example for example in examples if length_of(example) <= seq_len]
    return EncodedSource(examples=kept, skipped=len(examples) - len(kept))


def train_batches(
    source: Iterable[Record] | EncodedSource,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seq_len: int,
    seed: int,
    pack: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    place: Callable[[Batch], Any] | None = None,
) -> grain.DatasetIterator[Any]:
    """An endless iterator of this process's batches, every epoch in a new order.

    `source` is encoded here, unless it is already, for this `seq_len`: several iterators can share
    it. `batch_size` counts rows a process. Another `process_count` gives other batches; where
    it must not, let every process iterate over the full batches and place its rows of each, as
    `parallel.hosts.place` does. The order depends on the arguments alone. `get_state()` is a
    JSON-serialisable position, from which `set_state` on an iterator made with the same arguments
    resumes bit for bit. With `pack`, epochs may meet within a row.

    `place`, such as `jax.device_put`, is called on each batch in a thread that stays up to two
    batches ahead; the position is still that of the last batch taken.

    Raises:
      ValueError: as `encode_source`; or there are fewer examples than processes.
    """
    if not isinstance(source, EncodedSource):
        source = encode_source(source, tokenizer, seq_len=seq_len)
    examples = source.examples
    if len(examples) < process_count:
        raise ValueError(
            f"{len(examples)} examples cannot feed {process_count} processes: use fewer processes, "
            "more data or a longer context."
        )
    shard = grain.MapDataset.source(examples).shuffle(seed=seed)[process_index::process_count]
    endless = shard.repeat().to_iter_dataset(_IN_MEMORY)
    rows = pack_rows(endless, fields=examples[0], rows=batch_size, seq_len=seq_len, pack=pack)
    batches = rows.batch(batch_size, drop_remainder=True)
    if place is None:
        return iter(batches)
    ahead = grain.experimental.ThreadPrefetchIterDataset(
        batches.map(place), prefetch_buffer_size=AHEAD
    )
    return iter(ahead)


def count_batches(
    source: EncodedSource,
    tokenizer: Tokenizer,
    *,
    epochs: float,
    batch_size: int,
    seq_len: int,
    seed: int,
    pack: bool = True,
) -> int:
    """How many batches of `train_batches`, made with the same arguments, go `epochs` times through
    the examples. With `pack`, that depends on which lengths meet in a row: the rows are counted."""
    wanted = math.ceil(epochs * len(source.examples))
    if not pack:
        return math.ceil(wanted / batch_size)
    batches = train_batches(
        source, tokenizer, batch_size=batch_size, seq_len=seq_len, seed=seed, pack=pack
    )
    count = seen = 0
    while seen < wanted:
        segments = next(batches)["segment_ids"]
        seen += int(segments.reshape(len(segments), -1).max(axis=1).sum())
        count += 1
    return count


def eval_batches(
    source: Iterable[Record] | EncodedSource,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seq_len: int,
    limit: int | None = None,
    pack: bool = True,
) -> list[Batch]:
    """The first `limit` records (all by default) in their order, as batches of one shape. Encoded
    ones must be so for this `seq_len`.

    The last batch is filled up with rows of padding. Raises `ValueError` as `encode_source`.
    """
    if not isinstance(source, EncodedSource):
        source = encode_source(itertools.islice(source, limit), tokenizer, seq_len=seq_len)
    return _in_order(source.examples[:limit], batch_size, seq_len, pack)


def one_a_row(examples: Sequence[Example], *, batch_size: int, seq_len: int) -> list[Batch]:
    """Examples in their order, each in a row of its own; the last batch is filled up with rows of
    padding."""
    return _in_order(examples, batch_size, seq_len, pack=False)


def _in_order(
    examples: Sequence[Example], batch_size: int, seq_len: int, pack: bool
) -> list[Batch]:
    dataset = grain.MapDataset.source(examples).to_iter_dataset(_IN_MEMORY)
    rows = pack_rows(dataset, fields=examples[0], rows=batch_size, seq_len=seq_len, pack=pack)
    batches = list(rows.batch(batch_size))
    batches[-1] = {name: _fill(array, batch_size) for name, array in batches[-1].items()}
    return batches


def _fill(array: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(array, ((0, rows - len(array)), *[(0, 0)] * (array.ndim - 1)))
