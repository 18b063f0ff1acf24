import hashlib
import json
import re

import pytest

from lora_jax.data.records import SPLITS
from lora_jax.data.restaurants import SIZES, corpus


@pytest.fixture(scope="module")
def splits():
    readers = corpus().splits
    return {split: list(readers[split]()) for split in SPLITS}


def test_sizes_and_determinism(splits):
    assert {split: len(records) for split, records in splits.items()} == SIZES
    assert list(corpus().splits["test"]()) == splits["test"]
    # The same on every Python and numpy; a new wording changes it, and with it every result.
    digest = hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()
    assert digest[:16] == "091ffbe1266580e6"


def test_facts_are_disjoint_across_and_within_splits(splits):
    prompts = [r["messages"][1]["content"] for records in splits.values() for r in records]
    assert len(set(prompts)) == len(prompts)


def test_three_to_eight_facts_and_every_value_is_told(splits):
    counts = set()
    for record in splits["train"]:
        system, user, assistant = (message["content"] for message in record["messages"])
        facts = dict(re.findall(r"(\w+)\[([^]]+)\]", user))
        counts.add(len(facts))
        assert system == "Describe the restaurant."
        for slot in ("name", "type", "food", "near"):
            assert facts.get(slot, "") in assistant
    assert counts == {3, 4, 5, 6, 7, 8}


def test_wording_is_clean_and_varied(splits):
    texts = [record["messages"][2]["content"] for record in splits["train"]]
    for text in texts:
        assert re.fullmatch(r"[A-Z].*\.", text)
        assert not re.search(r"  |[{}]| ,|\.\.|\b[Aa] [aeiou]|\b[Aa]n [^aeiouAEIOU]", text), text
        assert 1 <= len(re.findall(r"[.?](?: |$)", text)) <= 4, text
    openings = {
        " ".join(re.sub(r"The [A-Z]\w+ [A-Z]\w+|\w+'s \w+", "N", t).split()[:4]) for t in texts
    }
    assert len(openings) > 200
    assert len(set(texts)) == len(texts)
