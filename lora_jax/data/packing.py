"""Rows of a fixed length, each holding one example or several."""

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


def pack_rows(
    examples: grain.IterDataset[Example], *, rows: int, seq_len: int, pack: bool
) -> grain.IterDataset[Batch]:
    """First-fit packing of examples into rows of `seq_len`, `rows` of them open at a time.

    A row has the fields of its examples, zero where there is none, and segment_ids int32 [T] (1 for
    the row's first example, 2 for the next, 0 for padding) and positions int32 [T] (from 0 in every
    segment). With `pack=False` a row holds a single example.
    """
    packed = grain.experimental.FirstFitPackIterDataset(
        examples,
        length_struct={"tokens": seq_len, "targets": seq_len, "loss_mask": seq_len},
        num_packing_bins=rows,
        shuffle_bins=False,
        max_sequences_per_bin=None if pack else 1,
    )
    return packed.map(_row)


def _row(packed: dict[str, Any]) -> Batch:
    return {
        "tokens": packed["tokens"],
        "targets": packed["targets"],
        "loss_mask": packed["loss_mask"],
        "segment_ids": packed["tokens_segment_ids"],
        "positions": packed["tokens_positions"],
    }
