"""A text that has nothing to do with the task: a model's loss on it says what it forgets."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_jax.interop import Pretrained
from lora_jax.training import next_token_batch
from lora_jax.training.losses.loss import Batch

TOKENS = 4096  # of the text's beginning


def text_batches(model: Pretrained, path: Path, *, rows: int, length: int) -> Sequence[Batch]:
    """The first tokens of a text as batches of `rows` of `length`, each of which begins anew.

    Raises:
      ValueError: for a file that is not there, is no text, or does not fill a batch.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a file of UTF-8 text: {error}") from None
    most = max(1, TOKENS // (rows * length)) * rows * (length + 1)
    # A page of characters holds fewer tokens than characters.
    ids = np.array(model.tokenizer.encode(text[: 20 * most])[:most], np.int32)
    count = len(ids) // (rows * (length + 1))
    if not count:
        raise ValueError(
            f"{path} has {len(ids)} tokens, which do not fill a batch of {rows} x {length + 1}: "
            "choose a longer text."
        )
    batches = ids[: count * rows * (length + 1)].reshape(count, rows, length + 1)
    return [next_token_batch(batch) for batch in batches]
