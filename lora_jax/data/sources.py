"""Where records come from: one function for every source.

A source is a frozen sequence of records, read at random; a record is a conversation,
`{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}`, or a pair
of answers, `{"prompt": [messages], "chosen": [messages], "rejected": [messages]}`.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from lora_jax.data import e2e, jsonl, preferences, restaurants
from lora_jax.data.records import Record

TFDS_PREFIX = "tfds:"


def load_source(
    name: str,
    *,
    split: str,
    path: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    prompt_field: str | None = None,
    response_field: str | None = None,
    chosen_field: str | None = None,
    rejected_field: str | None = None,
    validation_path: str | os.PathLike[str] | None = None,
    held_out: jsonl.HeldOut | None = None,
) -> Sequence[Record]:
    """The records of one split.

    Args:
      name: "restaurants" or "preferences" (generated: conversations, or pairs), "e2e" (the folder
        `path`), "jsonl" (the file or folder `path`), or "tfds:NAME" for a dataset of the TFDS
        catalogue.
      split: "train", "validation" or "test"; of a TFDS dataset also "train[:10%]" and the like.
      cache_dir: where prepared data is kept; `$LORA_JAX_CACHE`, else `~/.cache/lora_jax`.
      prompt_field, response_field: the two fields of a TFDS dataset to use;
      chosen_field, rejected_field: or those of its pairs, with `prompt_field` where these are
        answers and not full conversations.
      validation_path: of "jsonl", a file of validation examples.
      held_out: of "jsonl" without one, which examples are the validation split.

    Raises:
      ValueError: an unknown name or split, data that is missing, malformed or empty; validation
        examples for a source that has its own.
    """
    if validation_path is not None and name != "jsonl":
        raise ValueError(
            f"validation_path={str(validation_path)!r}: source {name!r} has validation examples of "
            "its own."
        )
    cache = Path(cache_dir or default_cache_dir()).expanduser()
    # TFDS costs half a second to import, and only data that is really read needs it.
    if name.startswith(TFDS_PREFIX):
        from lora_jax.data.external import open_external

        return open_external(
            name.removeprefix(TFDS_PREFIX),
            split,
            cache,
            {
                "prompt": prompt_field,
                "response": response_field,
                "chosen": chosen_field,
                "rejected": rejected_field,
            },
        )
    if name == "restaurants":
        corpus = restaurants.corpus()
    elif name == "preferences":
        corpus = preferences.corpus()
    elif name == "e2e":
        corpus = e2e.corpus(_given(path, name))
    elif name == "jsonl":
        own = None if validation_path is None else Path(validation_path).expanduser()
        corpus = jsonl.corpus(_given(path, name), validation_path=own, held_out=held_out)
    else:
        raise ValueError(
            f"Unknown source {name!r}: expected restaurants, e2e, jsonl or tfds:NAME, or of pairs "
            "preferences."
        )
    if split not in corpus.splits:
        raise ValueError(
            f"Source {name} has no split {split!r}; it has {', '.join(corpus.splits)}."
        )
    from lora_jax.data.prepared import open_split

    return open_split(corpus, split, cache)


def default_cache_dir() -> Path:
    """`$LORA_JAX_CACHE` if set, else `~/.cache/lora_jax`."""
    return Path(os.environ.get("LORA_JAX_CACHE") or "~/.cache/lora_jax").expanduser()


def _given(path: str | os.PathLike[str] | None, name: str) -> Path:
    if path is None:
        raise ValueError(f"Source {name!r} is read from disk: give its path.")
    return Path(path).expanduser()
