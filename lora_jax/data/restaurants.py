"""A generated data-to-text corpus about invented restaurants, in the spirit of E2E.

A record asks for a description of a few facts, `name[The Idle Wren], food[Thai], price[cheap]`, and
answers in one to three sentences. Nothing is downloaded and the same records come out everywhere.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from lora_jax.data import restaurant_text, restaurant_words
from lora_jax.data.records import (
    TEST,
    TRAIN,
    VALIDATION,
    Corpus,
    Record,
    conversation,
    file_fingerprint,
)
from lora_jax.data.restaurant_text import Facts, Pick, describe

SYSTEM = "Describe the restaurant."
SIZES = {TRAIN: 4000, VALIDATION: 400, TEST: 400}

_T = TypeVar("_T")
_SEED = 20240
VALUES = {
    "type": restaurant_words.TYPES,
    "food": restaurant_words.FOODS,
    "price": restaurant_words.PRICES,
    "rating": restaurant_words.RATINGS,
    "area": restaurant_words.AREAS,
    "family": restaurant_words.YES_NO,
    "near": restaurant_words.LANDMARKS,
}
_SLOT_COUNTS = (3, 4, 4, 5, 5, 5, 6, 6, 7, 8)


def corpus() -> Corpus:
    """The corpus: 4000 training, 400 validation and 400 test records; no facts occur twice."""
    modules = (__file__, restaurant_text.__file__, restaurant_words.__file__)
    return Corpus(
        name="restaurants",
        fingerprint=file_fingerprint(*modules),
        splits=distinct_splits(SIZES, _SEED, _record),
    )


def _record(facts: Facts, pick: Pick) -> Record:
    return conversation(meaning(facts), describe(facts, pick), system=SYSTEM)


def distinct_splits(
    sizes: Mapping[str, int], seed: int, record: Callable[[Facts, Pick], Record]
) -> dict[str, Callable[[], Iterator[Record]]]:
    """Splits of so many records, `record(facts, pick)` each, among which no facts occur twice."""

    def generate(wanted: str) -> Iterator[Record]:
        pick = picker(seed)
        seen: set[str] = set()
        for split, size in sizes.items():
            remaining = size
            while remaining:
                facts = draw_facts(pick)
                made = record(facts, pick)
                if meaning(facts) in seen:
                    continue
                seen.add(meaning(facts))
                remaining -= 1
                if split == wanted:
                    yield made
            if split == wanted:
                return

    return {split: functools.partial(generate, split) for split in sizes}


def meaning(facts: Facts) -> str:
    """The facts as the model reads them: `name[The Idle Wren], food[Thai]`."""
    return ", ".join(f"{slot}[{value}]" for slot, value in facts.items())


def draw_facts(pick: Pick) -> Facts:
    """A name and two to seven other facts."""
    chosen: set[str] = set()
    count = pick(_SLOT_COUNTS)
    while len(chosen) < count - 1:
        chosen.add(pick(tuple(VALUES)))
    return {"name": _name(pick)} | {s: pick(VALUES[s]) for s in VALUES if s in chosen}


def _name(pick: Pick) -> str:
    words = restaurant_words
    if pick((True, True, True, False)):
        return f"The {pick(words.ADJECTIVES)} {pick(words.NOUNS)}"
    return f"{pick(words.OWNERS)}'s {pick(words.ROOMS)}"


def picker(seed: int) -> Pick:
    """Draws options in an order that follows from the seed alone."""
    # Raw bits only: numpy keeps these the same for ever, its distributions it may change.
    bits = np.random.Philox(key=seed)

    def pick(options: Sequence[_T], /) -> _T:
        return options[int(bits.random_raw()) % len(options)]

    return pick
