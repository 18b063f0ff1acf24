"""A generated corpus of preferences: descriptions of invented restaurants, true and untrue.

A record asks for a description of a few facts, as that of `restaurants` does. The chosen answer
states all of them; the rejected one, worded anew, leaves one out, states another value, or adds a
fact that was not given. So what is preferred can be counted by a rule, `restaurant_check.mistakes`,
and length says little about it. Nothing is downloaded and the records are the same everywhere.
"""

from lora_jax.data import restaurant_check, restaurant_text, restaurant_words, restaurants
from lora_jax.data.records import TEST, TRAIN, VALIDATION, Corpus, Record, file_fingerprint
from lora_jax.data.restaurant_text import Facts, Pick, describe
from lora_jax.data.restaurants import SYSTEM, VALUES, distinct_splits, meaning

SIZES = {TRAIN: 2000, VALIDATION: 200, TEST: 200}
FLAWS = ("leaves out", "changes", "adds")
_SEED = 20241


def corpus() -> Corpus:
    """The corpus: 2000 training, 200 validation and 200 test records; no facts occur twice."""
    modules = (restaurants, restaurant_text, restaurant_words, restaurant_check)
    return Corpus(
        name="preferences",
        fingerprint=file_fingerprint(__file__, *(str(module.__file__) for module in modules)),
        splits=distinct_splits(SIZES, _SEED, _record),
    )


def _record(facts: Facts, pick: Pick) -> Record:
    chosen, rejected = describe(facts, pick), describe(flawed(facts, pick), pick)
    prompt = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": meaning(facts)},
    ]
    answers = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return {"prompt": prompt, **dict(zip(("chosen", "rejected"), answers, strict=True))}


def flawed(facts: Facts, pick: Pick) -> Facts:
    """The facts without one of them, with another value of one, or with one more."""
    given = tuple(slot for slot in VALUES if slot in facts)
    others = tuple(slot for slot in VALUES if slot not in facts)
    flaw = pick(FLAWS if others else FLAWS[:2])
    if flaw == "adds":
        more = pick(others)
        return facts | {more: pick(VALUES[more])}
    slot = pick(given)
    if flaw == "leaves out":
        return {name: value for name, value in facts.items() if name != slot}
    wrong = pick(tuple(value for value in VALUES[slot] if value != facts[slot]))
    return facts | {slot: wrong}


def facts_of(record: Record) -> Facts:
    """The facts of a record's prompt: what `mistakes` compares an answer with."""
    content = record["prompt"][-1]["content"]
    parts = (part.removesuffix("]").partition("[") for part in content.split("], "))
    return {slot: value for slot, _, value in parts}
