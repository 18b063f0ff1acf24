"""What a model forgets: its loss on a text that has nothing to do with the task."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from lora_jax import data
from lora_jax.interop import Pretrained

TOKENS = 4096  # of the text's beginning


def text_batches(config: ConfigDict, model: Pretrained, path: Path) -> Sequence[data.Batch]:
    """The first tokens of a text, in rows of the config's, each of which begins anew; every token
    but a row's first counts.

    Raises:
      ValueError: for a file that is not there, is no text, or does not fill a row.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config.study.other_text={path}: expected a text file: {error}") from None
    rows, length = config.data.batch_size, config.data.seq_len
    # A page of characters holds fewer tokens than characters.
    ids = np.array(model.tokenizer.encode(text[: 16 * TOKENS])[: TOKENS + 1], np.int32)
    count = (len(ids) - 1) // (rows * length) * rows
    if not count:
        raise ValueError(
            f"config.study.other_text={path}: {len(ids)} tokens do not fill {rows} x {length}."
        )
    inputs, targets = (
        part[: count * length].reshape(-1, rows, length) for part in (ids[:-1], ids[1:])
    )
    ones = np.ones_like(inputs[0])
    return [
        {
            "tokens": tokens,
            "targets": wanted,
            "segment_ids": ones,
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape),
            "loss_mask": ones.astype(bool),
        }
        for tokens, wanted in zip(inputs, targets, strict=True)
    ]
