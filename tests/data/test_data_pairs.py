"""Pairs of answers from every source, as rows of both."""

import json
import logging

import numpy as np
import pytest

from lora_jax import data
from lora_jax.data import encode, preferences, restaurants
from lora_jax.data.packing import length_of
from lora_jax.data.pair_records import pair
from lora_jax.data.restaurant_check import mistakes, stated
from lora_jax.data.restaurant_text import describe

TOKENIZER = data.byte_tokenizer()
USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in [("user", "Hi?"), ("assistant", "Yes."), ("assistant", "No, never.")]
)
PAIR = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No, never."},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Hi?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD], "prompt": None},
        {"prompt": [USER], "chosen": "Yes.", "rejected": [BAD], "score": 3},
    ],
)
def test_a_pair_of_texts_of_messages_or_of_conversations(row):
    assert pair(row) == PAIR


def test_turns_before_the_answers_are_the_prompt():
    turns = [USER, GOOD, USER]
    sides = {"chosen": [*turns, GOOD], "rejected": [*turns, BAD]}
    assert pair(sides) == PAIR | {"prompt": turns}
    same = pair({"chosen": [*turns, GOOD], "rejected": [*turns, GOOD]})
    assert same == {"prompt": turns, "chosen": [GOOD], "rejected": [GOOD]}
    [example] = data.encode_pairs([PAIR | {"prompt": turns}], TOKENIZER, seq_len=200).examples
    text = TOKENIZER.decode(example["0/targets"][example["0/loss_mask"]].tolist())
    assert text == "Yes.<|im_end|>"  # not the earlier turn


@pytest.mark.parametrize(
    "row, message",
    [
        ({"chosen": "a", "rejected": "b"}, "no prompt: expected"),
        ({"prompt": "p", "chosen": "a"}, "`rejected` to be text or a list .*NoneType"),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, "`chosen` to be text .*found int"),
        ({"prompt": "p", "chosen": [{"role": "user"}], "rejected": "b"}, r"chosen\[0\] must be"),
        ({"prompt": "p", "chosen": [USER], "rejected": "b"}, "`chosen` .*does not begin|does not"),
        ({"prompt": "p", "chosen": [USER, GOOD], "rejected": "b"}, "does not begin with `prompt`"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "no prompt"),
        ({"chosen": [USER, GOOD], "rejected": [USER, USER]}, "`rejected` does not end"),
    ],
)
def test_a_row_that_is_no_pair(row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        pair(row)
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"pairs.jsonl:2: .*({message})"):
        data.load_source("jsonl", split="train", path=path, cache_dir=tmp_path)


def test_pairs_of_tfds(monkeypatch, tmp_path):
    """Text, and messages as TFDS stores them: a mapping of columns."""
    import tensorflow_datasets as tfds

    columns = {"role": np.array([b"user", b"assistant"]), "content": np.array([b"Hi?", b"Yes."])}
    other = {"role": [b"user", b"assistant"], "content": [b"Hi?", b"No, never."]}
    rows = [{"q": b"Hi?", "good": b"Yes.", "bad": b"No, never.", "a": columns, "b": other}]
    monkeypatch.setattr(tfds, "data_source", lambda name, **options: rows)

    def load(**fields):
        return data.load_source("tfds:some", split="train", cache_dir=tmp_path, **fields)[0]

    assert load(prompt_field="q", chosen_field="good", rejected_field="bad") == PAIR
    assert load(chosen_field="a", rejected_field="b") == PAIR
    with pytest.raises(ValueError, match="row 0: no prompt"):
        load(chosen_field="good", rejected_field="bad")
    with pytest.raises(ValueError, match="or of pairs chosen_field and rejected_field"):
        load(prompt_field="q", chosen_field="good")
    with pytest.raises(ValueError, match="no field 'worse'"):
        load(prompt_field="q", chosen_field="good", rejected_field="worse")


def texts(prompt, chosen, rejected):
    return pair({"prompt": prompt, "chosen": chosen, "rejected": rejected})


BROKEN = [
    texts("p", "same", " same "),
    texts("p", "a", "  "),
    texts("p", "", "b"),
    texts("p" * 90, "a", "b"),
]


@pytest.mark.parametrize("encoder, each", [(data.encode_pairs, 1), (data.encode_judged, 2)])
def test_pairs_that_teach_nothing_are_counted(encoder, each, caplog):
    good = [texts("one", "a", "bb"), texts("two", "aaa", "b")]
    with caplog.at_level(logging.WARNING):
        found = encoder([good[0], *BROKEN, good[1]], TOKENIZER, seq_len=60)
    shown = f"1 with equal answers, 2 with an empty answer, {each} longer than the context"
    assert f"Skipped pairs: {shown}." in caplog.text
    # For KTO the long prompt is also beside another one's answers.
    assert len(found.examples) == 2 * each and found.skipped == 3 + each
    with pytest.raises(ValueError, match="No pair is left to learn from: 1 with equal.* of 60"):
        encoder([*BROKEN, BROKEN[-1]], TOKENIZER, seq_len=60)
    with pytest.raises(ValueError, match="Example 1 is no pair: .*found messages"):
        encoder([good[0], {"messages": [USER, GOOD]}], TOKENIZER, seq_len=60)
    with pytest.raises(ValueError, match="holds no examples"):
        encoder([], TOKENIZER, seq_len=60)
    with pytest.raises(ValueError, match="Example 0 is no conversation but holds prompt, chosen"):
        data.encode_records(good, TOKENIZER)


def test_kto_needs_two_prompts():
    with pytest.raises(ValueError, match="A single pair is left"):
        data.encode_judged([PAIR], TOKENIZER, seq_len=60)


def some(count=9):
    rng = np.random.default_rng(0)
    return [
        texts("q" * int(rng.integers(1, 9)), *("ab"[i] * int(rng.integers(1, 30)) for i in (0, 1)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("judged", [True, False])
def test_rows_hold_both_answers_in_segments_of_one_number(pack, judged):
    encoder = data.encode_judged if judged else data.encode_pairs
    source = encoder(some(), TOKENIZER, seq_len=160)
    options = {"batch_size": 3, "seq_len": 160, "pack": pack}
    expected = sorted(
        tuple(example["0/tokens"]) + tuple(example["1/tokens"]) for example in source.examples
    )
    found = []
    for batch in data.eval_batches(source, TOKENIZER, **options):
        assert {name: array.shape for name, array in batch.items() if name != "desirable"} == (
            dict.fromkeys(
                ("tokens", "targets", "loss_mask", "segment_ids", "positions"), (3, 2, 160)
            )
        )
        for row in range(3):
            ids = batch["segment_ids"][row]
            assert ids[0].max() == ids[1].max() and (pack or ids.max() <= 1)
            for segment in range(1, ids.max() + 1):
                inside = ids == segment
                sides = [batch["tokens"][row, side][inside[side]] for side in range(2)]
                found.append(tuple(sides[0]) + tuple(sides[1]))
                for side in range(2):
                    assert batch["positions"][row, side][inside[side]].tolist() == list(
                        range(inside[side].sum())
                    )
                if judged:
                    assert batch["desirable"].shape == (3, 160)
                    flags = batch["desirable"][row][inside[0]]
                    counts = batch["loss_mask"][row, 0] & inside[0]
                    answer = batch["targets"][row, 0][counts][0]
                    assert flags.all() == flags.any() == (answer == ord("a"))
    assert sorted(found) == expected
    endless = data.train_batches(source, TOKENIZER, seed=3, **options)
    position = endless.get_state()
    first = next(endless)
    endless.set_state(position)
    for name, array in next(endless).items():
        np.testing.assert_array_equal(array, first[name])
    assert data.count_batches(source, TOKENIZER, epochs=1, seed=3, **options) >= 1


def test_the_generated_pairs_differ_by_a_countable_fact(tmp_path):
    corpus = preferences.corpus()
    train = list(corpus.splits["train"]())
    assert len(train) == 2000 and train == list(corpus.splits["train"]())
    prompts = {record["prompt"][-1]["content"] for record in train}
    assert len(prompts) == 2000
    longer = []
    for record in train:
        facts = preferences.facts_of(record)
        chosen, rejected = (record[side][0]["content"] for side in ("chosen", "rejected"))
        assert mistakes(facts, chosen) == 0, (chosen, stated(chosen))
        assert mistakes(facts, rejected) in (1, 2), (rejected, facts)
        longer.append(len(chosen) > len(rejected))
    assert 0.4 < np.mean(longer) < 0.6  # so that length tells little
    source = data.load_source("preferences", split="validation", cache_dir=tmp_path)
    assert len(source) == 200 and not prompts & {r["prompt"][-1]["content"] for r in source}


def test_the_rule_reads_every_wording():
    pick = restaurants.picker(5)
    for _ in range(400):
        facts = restaurants.draw_facts(pick)
        text = describe(facts, pick)
        assert stated(text) == {item for item in facts.items() if item[0] != "name"}, text
    assert mistakes({"name": "The Idle Wren"}, "The place is cheap.") == 2


def test_an_example_is_as_long_as_its_longer_answer():
    [example] = data.encode_pairs([PAIR], TOKENIZER, seq_len=60).examples
    sides = [encode([USER, side], TOKENIZER).tokens for side in (GOOD, BAD)]
    assert length_of(example) == max(map(len, sides)) - 2  # the last target, and what follows it
