"""Rows of a fixed length, each holding one example or several."""

from collections.abc import Iterable
from typing import Any

import grain
import numpy as np

from lora_jax.data.encode import Encoded

Example = dict[str, np.ndarray]
Batch = dict[str, np.ndarray]


def next_token_example(encoded: Encoded) -> Example:
    """The inputs and targets of an example, position by position.

    Returns tokens int32 [n], targets int32 [n] (the token after each) and loss_mask bool [n] (true
    where the target counts). It ends at the last target that counts: later tokens train nothing.
    """
    stop = int(np.flatnonzero(encoded.loss_mask)[-1]) + 1
    return {
        "tokens": encoded.tokens[: stop - 1],
        "targets": encoded.tokens[1:stop],
        "loss_mask": encoded.loss_mask[1:stop],
    }


def answer_pair(first: Example, second: Example) -> Example:
    """Two examples as one, whose fields a batch stacks on an axis behind its rows: `0/tokens`,
    `1/tokens`. In every row the segments of both have the same numbers."""
    sides = enumerate((first, second))
    return {f"{side}/{name}": array for side, part in sides for name, array in part.items()}


def length_of(example: Example) -> int:
    """How many positions of a row an example takes."""
    return max(len(array) for array in example.values())


def pack_rows(
    examples: grain.IterDataset[Example],
    *,
    fields: Iterable[str],
    rows: int,
    seq_len: int,
    pack: bool,
) -> grain.IterDataset[Batch]:
    """First-fit packing of examples into rows of `seq_len`, `rows` of them open at a time.

    A row has the fields of its examples, zero where there is none, and segment_ids int32 [T] (1 for
    the row's first example, 2 for the next, 0 for padding) and positions int32 [T] (from 0 in every
    segment); those of an `answer_pair` are stacked, [2, T]. With `pack=False` a row holds a single
    example.
    """  # fmt: skip
    packed = grain.experimental.FirstFitPackIterDataset(
        examples,
        length_struct=dict.fromkeys(fields, seq_len),
        num_packing_bins=rows,
        shuffle_bins=False,
        max_sequences_per_bin=None if pack else 1,
    )
    return packed.map(_row)


def _row(packed: dict[str, Any]) -> Batch:
    """The packer adds to every field its segments and positions: those of the tokens are all."""
    row: dict[str, Any] = {}
    for key, array in packed.items():
        side, _, name = key.rpartition("/")
        if name in ("tokens_segment_ids", "tokens_positions"):
            name = name.removeprefix("tokens_")
        elif name.endswith(("_segment_ids", "_positions")):
            continue
        row.setdefault(name, {})[side] = array
    return {
        name: sides[""] if "" in sides else np.stack([sides["0"], sides["1"]])
        for name, sides in row.items()
    }
