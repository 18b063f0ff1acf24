"""Which facts a description of a restaurant states: a rule, without a judge.

The words are those of the corpus, looked up the longest first, so that "not family-friendly" is not
"family-friendly". What is worded otherwise counts as left out.
"""

import functools
import re
from collections.abc import Mapping

from lora_jax.data import restaurant_words as words
from lora_jax.data.restaurant_text import Facts


def mistakes(facts: Facts, text: str) -> int:
    """How many of the facts a text leaves out, and how many others it states."""
    wanted = {item for item in facts.items() if item[0] != "name"}
    found = stated(text)
    unnamed = facts["name"].lower() not in text.lower()
    return len(wanted ^ found) + unnamed


def stated(text: str) -> set[tuple[str, str]]:
    """The facts, but the name, that a text states: `{("food", "Thai"), ("price", "cheap")}`."""
    pattern, meanings = _phrases()
    return {meanings[match.group().lower()] for match in pattern.finditer(text)}


@functools.cache
def _phrases() -> tuple[re.Pattern[str], dict[str, tuple[str, str]]]:
    meanings: dict[str, tuple[str, str]] = {}

    def add(slot, value, *phrases):
        for phrase in phrases:
            meanings[phrase.removeprefix("is ").lower()] = slot, value

    worded: tuple[tuple[str, tuple[Mapping[str, tuple[str, ...]], ...]], ...] = (
        ("price", (words.PRICE_BEFORE, words.PRICE_THING, words.PRICE_IS)),
        ("rating", (words.RATING_BEFORE, words.RATING_THING, words.RATING_IS)),
        ("family", (words.FAMILY_BEFORE, words.FAMILY_IS)),
        ("area", (words.AREA_WHERE,)),
    )
    for slot, tables in worded:
        for table in tables:
            for value, phrases in table.items():
                add(slot, value, *phrases)
    for slot, values in (
        ("type", words.TYPES),
        ("food", words.FOODS),
        ("near", words.LANDMARKS),
    ):
        for value in values:
            add(slot, value, value)
    longest_first = sorted(map(re.escape, meanings), key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(longest_first)})\b", re.IGNORECASE), meanings
