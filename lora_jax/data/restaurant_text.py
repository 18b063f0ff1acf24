"""Wording of restaurant facts: sentence plans, aggregation and synonyms.

A fact may stand before the noun ("a cheap pub"), after it ("a pub with low prices") or in a clause
of its own ("It charges low prices."). A plan deals the facts out to these places.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from lora_jax.data import restaurant_words as words

Facts = dict[str, str]
_T = TypeVar("_T")

_UNWELCOME = {("rating", "low"), ("price", "expensive"), ("family", "no")}


class Pick(Protocol):
    """Draws one of several options."""

    def __call__(self, options: Sequence[_T], /) -> _T: ...


def describe(facts: Facts, pick: Pick) -> str:
    """One to three sentences that state every one of `facts` once."""
    slots = _shuffled([slot for slot in facts if slot not in ("name", "type")], pick)
    share = pick((1, 2, 2, 3, 3, 4))
    opening, rest = slots[:share], slots[share:]
    sentences = [_opening(_only(facts, "name", "type", *opening), pick)]
    while rest:
        last_sentence = len(sentences) == 2 or len(rest) <= 2
        count = len(rest) if last_sentence else pick((1, 2, 2))
        subject = pick(("It", "It", f"The {facts.get('type', 'place')}"))
        sentences.append(f"{subject} {_clauses(_only(facts, *rest[:count]), pick)}.")
        rest = rest[count:]
    return " ".join(sentences)


def _opening(facts: Facts, pick: Pick) -> str:
    name = facts["name"]
    plan = pick(("plain", "plain", "plain", "there is", "place first", "advice"))
    if plan == "there is":
        return f"There is {_noun_phrase(facts, pick, called=name)}."
    if plan == "advice" and facts.get("rating") != "low":
        advice = pick(("If you want {}, try {}.", "For {}, try {}.", "Looking for {}? Try {}."))
        return advice.format(_noun_phrase(facts, pick), name)
    where = _where(facts, pick)
    if plan == "place first" and where:
        lead = pick((f"Located {where}", f"Situated {where}", where[0].upper() + where[1:]))
        elsewhere = {slot: value for slot, value in facts.items() if slot not in ("area", "near")}
        return f"{lead}, {name} is {_noun_phrase(elsewhere, pick)}."
    return f"{name} is {_noun_phrase(facts, pick)}."


def _noun_phrase(facts: Facts, pick: Pick, *, called: str | None = None) -> str:
    """Such as 'a cheap Thai pub called The Idle Wren by the river with a high rating'."""
    before: list[str] = []
    things: list[str] = []
    if "family" in facts:
        before.append(pick(words.FAMILY_BEFORE[facts["family"]]))
    for slot, adjectives, nouns in (
        ("rating", words.RATING_BEFORE, words.RATING_THING),
        ("price", words.PRICE_BEFORE, words.PRICE_THING),
    ):
        if slot in facts and not before and pick((True, True, False)):
            before.append(pick(adjectives[facts[slot]]))
        elif slot in facts:
            things.append(pick(nouns[facts[slot]]))
    food = pick(words.FOOD_DOING).format(facts["food"]) if "food" in facts else ""
    if food and pick((True, False)):
        before.append(facts["food"])
        food = ""
    head = facts.get("type") or pick(words.UNTYPED)
    name = f"{pick(('called', 'named'))} {called}" if called else ""
    having = "with " + " and ".join(things) if things else ""
    parts = (*before, head, name, _where(facts, pick), food, having)
    phrase = " ".join(part for part in parts if part)
    return f"{'an' if phrase[0] in 'aeiouAEIOU' else 'a'} {phrase}"


def _clauses(facts: Facts, pick: Pick) -> str:
    """Such as 'serves Thai food and is cheap, but is not family-friendly'."""
    welcome: list[str] = []
    unwelcome: list[str] = []
    if where := _where(facts, pick):
        welcome.append(pick(words.WHERE_IS).format(where))
    if "food" in facts:
        welcome.append(pick(words.FOOD_DOES).format(facts["food"]))
    for slot, wordings in (
        ("price", words.PRICE_IS),
        ("rating", words.RATING_IS),
        ("family", words.FAMILY_IS),  # last, so that its "not" governs nothing else
    ):
        if slot in facts:
            side = unwelcome if (slot, facts[slot]) in _UNWELCOME else welcome
            side.append(pick(wordings[facts[slot]]))
    sides = [_series(side) for side in (_shuffled(welcome, pick), unwelcome) if side]
    return pick((" but ", ", but ", ", though it ")).join(sides)


def _where(facts: Facts, pick: Pick) -> str:
    area = pick(words.AREA_WHERE[facts["area"]]) if "area" in facts else ""
    near = pick(words.NEAR_WHERE).format(facts["near"]) if "near" in facts else ""
    return f"{area} {near}".strip()


def _series(verbs: list[str]) -> str:
    """'is cheap', 'is near' -> 'is cheap and near'; 'a', 'b', 'c' -> 'a, b and c'."""
    if all(verb.startswith("is ") for verb in verbs):
        verbs = [verbs[0], *(verb.removeprefix("is ") for verb in verbs[1:])]
    *first, last = verbs
    return f"{', '.join(first)} and {last}" if first else last


def _only(facts: Facts, *slots: str) -> Facts:
    return {slot: facts[slot] for slot in slots if slot in facts}


def _shuffled(items: list[str], pick: Pick) -> list[str]:
    left, shuffled = list(items), []
    while left:
        shuffled.append(pick(left))
        left.remove(shuffled[-1])
    return shuffled
