"""Scores of texts: equal to the E2E scorer's, and what must hold of any."""

import csv
import dataclasses
import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments.scores import NAMES, cider, meteor, missing, mteval, ptb, rouge, scores
from experiments.scores.generated import answers, grouped
from lora_jax import data
from lora_jax.data.records import conversation
from lora_jax.interop import Pretrained
from lora_jax.models import SHAPES, llama

ROOT = Path(__file__).parents[2]
SHARED = next((p for p in (up / "shared/data" for up in ROOT.parents) if p.exists()), ROOT / "none")
# Printed by measure_scores.py of github.com/tuetschek/e2e-metrics at 1b9c4d8, as it runs by default
# (mteval-v13a-sig.pl, PTBTokenizer of CoreNLP 3.4.1); NIST_p with its option -p.
GOLDEN = json.loads((ROOT / "tests/golden/e2e_scores.json").read_text(encoding="utf-8"))
# The same for the first reference of all meanings in E2E's test.txt, or of every tenth, against
# its others.
PEOPLE = {
    1: {"BLEU": "0.6183", "NIST": "9.0212", "METEOR": "0.4591", "ROUGE_L": "0.6472",
        "CIDEr": "2.0726", "NIST_p": "9.0185"},
    10: {"BLEU": "0.6095", "NIST": "8.5168", "METEOR": "0.4641", "ROUGE_L": "0.6402",
         "CIDEr": "2.2200", "NIST_p": "8.5168"},
}  # fmt: skip
# Of the challenge's baseline, in its results (Dušek et al. 2020, arXiv:1901.07931).
TGEN = {"BLEU": "0.6593", "NIST": "8.6094", "METEOR": "0.4483", "ROUGE_L": "0.6850",
        "CIDEr": "2.2338"}  # fmt: skip

OUTPUTS = [item["output"] for item in GOLDEN["items"]]
REFERENCES = [item["references"] for item in GOLDEN["items"]]


@pytest.fixture
def without_meteor(monkeypatch):
    """Its program takes seconds to start, where it is installed."""
    monkeypatch.setattr(meteor, "jar", lambda: None)


def printed(found):
    return {name: f"{score:.4f}" for name, score in found.items()}


def had(expected):
    return {name: score for name, score in expected.items() if name not in missing()}


def test_scores_are_the_official_ones_to_the_printed_digits():
    found = printed(scores(OUTPUTS, REFERENCES))
    assert found == had(GOLDEN["scores"])
    assert tuple(GOLDEN["scores"]) == NAMES


@pytest.mark.skipif(not (SHARED / "e2e").exists(), reason="wants shared/data/e2e")
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 10])
def test_people_score_among_themselves_what_the_official_scorer_says(every, without_meteor):
    records = data.load_source("e2e", split="test", path=SHARED / "e2e")
    items = grouped(records)
    assert (len(items.meanings), sum(map(len, items.references))) == (630, 4693)
    references = items.references[::every]
    found = scores([texts[0] for texts in references], [texts[1:] or texts for texts in references])
    assert printed(found) == had(PEOPLE[every])


@pytest.mark.skipif(not (SHARED / "e2e_outputs").exists(), reason="wants shared/data/e2e_outputs")
def test_the_baseline_scores_what_was_published(without_meteor):
    """Beside the challenge's own references: those of the LoRA paper's data are tokenised, `kid -
    friendly`, and give it a BLEU of 0.6350."""

    def rows(name, delimiter):
        with (SHARED / "e2e_outputs" / name).open(encoding="utf-8-sig", newline="") as file:
            return [row[:2] for row in csv.reader(file, delimiter=delimiter)][1:]

    items = grouped(conversation(*row) for row in rows("testset_w_refs.csv", ","))
    found = printed(scores([said for _, said in rows("tgen.tsv", "\t")], items.references))
    assert {name: found[name] for name in had(TGEN)} == had(TGEN)


def test_words_are_those_of_the_two_tokenizers():
    text = "It's £20-25 (cheap), isn't it? Cannot say... No. 5 St. John's, 10:30am, café & “bar”"
    assert " ".join(ptb.words(text)) == (
        "it 's # 20-25 -lrb- cheap -rrb- is n't it can not say no. 5 st. john 's 10:30 am café & "
        "bar"
    )
    assert " ".join(mteval.words("It's £20-25 (cheap), 4.5 of 5. ÉTÉ &amp; Été")) == (
        "it's £20 - 25 ( cheap ) , 4.5 of 5 . ÉtÉ & Été"
    )


@pytest.fixture(scope="module")
def corpus():
    """Items of made-up texts with several references each, and an output that none of them is."""
    pick = random.Random(0)

    def text():
        names = pick.choice(["The Otter", "Bell & Anchor", "Green Kite"])
        parts = ["serves cheap food", "is near the river", "isn't for children", "costs £20-25"]
        return f"{names} {' and '.join(pick.sample(parts, pick.randint(2, 4)))}."

    references = [[text() for _ in range(pick.randint(1, 4))] for _ in range(12)]
    return [text() for _ in references], references


def test_a_reference_as_output_is_perfect_and_another_text_is_not(corpus, without_meteor):
    outputs, references = corpus
    perfect = scores([texts[-1] for texts in references], references)
    assert perfect["BLEU"] == pytest.approx(1) and perfect["ROUGE_L"] == pytest.approx(1)
    found = scores(outputs, references)
    assert all(0 < found[name] < perfect[name] for name in found)
    alone = [[texts[-1]] for texts in references]
    # Ten times the share of orders, here all, in which an item has an n-gram that not all have.
    assert scores([texts[0] for texts in alone], alone)["CIDEr"] == pytest.approx(10)


def test_the_order_of_items_and_of_references_does_not_matter(corpus, without_meteor):
    outputs, references = corpus
    pairs = list(zip(outputs, references, strict=True))[::-1]
    turned = scores([one for one, _ in pairs], [texts[::-1] for _, texts in pairs])
    assert turned == pytest.approx(scores(outputs, references))


def test_more_references_never_lose_a_match(corpus):
    outputs, references = corpus
    few = mteval.items(outputs, [texts[:1] for texts in references])
    many = mteval.items(outputs, references)
    for n in range(1, 5):
        for one, all_ in zip(few, many, strict=True):
            assert mteval.matches(one, n) <= mteval.matches(all_, n)
    words = [ptb.words(text) for text in outputs]
    known = [[ptb.words(text) for text in texts] for texts in references]
    assert rouge.rouge_l(words, [texts[:1] for texts in known]) <= rouge.rouge_l(words, known)


def test_an_empty_answer_matches_nothing_and_counts(corpus, without_meteor):
    outputs, references = corpus
    full = scores(outputs, references)
    for blank in ("", " \n"):
        found = scores([blank, *outputs[1:]], references)
        assert all(found[name] < full[name] for name in ("ROUGE_L", "CIDEr"))
    empty, texts = [[]], [[["a", "pub"]]]
    assert rouge.rouge_l(empty, texts) == cider.cider(empty, texts) == 0
    assert mteval.bleu(mteval.items(["", ""], [["a pub"], ["a pub"]])) == 0


def test_line_breaks_are_spaces(corpus, without_meteor):
    outputs, references = corpus
    broken = [text.replace(" ", "\n", 1) + "\n" for text in outputs]
    assert scores(broken, references) == scores(outputs, references)


@pytest.mark.parametrize(
    "outputs, references, said",
    [
        ([], [], "no outputs"),
        (["a"], [], "1 outputs and references of 0 items"),
        (["a"], [["a"], ["b"]], "1 outputs and references of 2 items"),
        (["a", "b"], [["a"], []], "item 1 has no references"),
        (["a", "b"], [["a", " "], ["b"]], "item 0 has an empty reference"),
        (["a"], ["a pub"], r"references\[0\] is one text"),
        ("ab", [["a"], ["b"]], "outputs is one text"),
        (["", " \n"], [["a"], ["b"]], "all 2 outputs are empty: the model answered nothing"),
    ],
)
def test_what_cannot_be_scored_is_refused(outputs, references, said):
    with pytest.raises(ValueError, match=said):
        scores(outputs, references)


@pytest.mark.parametrize("lacks, reason", [("java", "there is no `java`"), ("jar", "meteor-1.5")])
def test_without_its_program_meteor_is_left_out_and_why(corpus, monkeypatch, lacks, reason):
    monkeypatch.setattr(meteor.shutil, "which", lambda _: None if lacks == "java" else "java")
    monkeypatch.setattr(meteor, "jar", lambda: None)
    assert reason in missing()["METEOR"] and "pip install" in missing()["METEOR"]
    assert set(scores(*corpus)) == set(NAMES) - {"METEOR"}


@pytest.mark.parametrize("answer", ["exit 1", "cat; exit 1", "cat"])
def test_a_program_that_fails_says_what_it_said(corpus, tmp_path, monkeypatch, answer):
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\necho no memory >&2\n{answer}\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(meteor, "jar", lambda: tmp_path / "meteor-1.5.jar")
    with pytest.raises(RuntimeError, match="meteor-1.5.jar gave no score: no memory"):
        scores(*corpus)


def test_references_are_grouped_by_meaning_wherever_they_are():
    pairs = [("name : Otter", "a"), ("name : Kite", "b"), ("name : Otter", "c"), ("x", "b")]
    items = grouped(conversation(*pair, system="s") for pair in pairs)
    assert items.meanings == ["name : Otter", "name : Kite", "x"]
    assert items.references == [["a", "c"], ["b"], ["b"]]
    with pytest.raises(ValueError, match="no records"):
        grouped([])
    with pytest.raises(ValueError, match="record 0 does not end"):
        grouped([{"messages": [{"role": "user", "content": "x"}]}])


@pytest.fixture(scope="module")
def tiny():
    config = SHAPES["tiny"]
    params = llama.init(config, key=jax.random.key(0))
    return Pretrained(
        params=params, config=config, tokenizer=data.byte_tokenizer(), name="tiny", source="random"
    )


def test_answers_are_in_order_whatever_the_batches(tiny):
    prompts = ["name : Otter", "x", "name : Kite | area : river", "x", "a pub"]
    found = answers(tiny, {}, prompts, max_new_tokens=6, batch_size=5)
    assert found[1] == found[3] and len(set(found)) > 1
    assert answers(tiny, {}, prompts, max_new_tokens=6, batch_size=2) == found
    assert answers(tiny, {}, prompts[::-1], max_new_tokens=6, batch_size=2) == found[::-1]


def test_an_answer_ends_before_an_empty_line(tiny):
    spoken = types_of(tiny, lambda ids, skip_special_tokens: " a pub\nby a river\n\nAnd more")
    assert answers(spoken, {}, ["x"], max_new_tokens=6) == ["a pub\nby a river"]


def types_of(model, decode):
    """The model with a tokenizer that decodes by `decode`."""

    class Spoken:
        eos_id, encode = model.tokenizer.eos_id, model.tokenizer.encode

    Spoken.decode = staticmethod(decode)
    return dataclasses.replace(model, tokenizer=Spoken())


def test_prompts_that_have_no_answer_are_refused(tiny):
    with pytest.raises(ValueError, match="no prompts"):
        answers(tiny, {}, [])
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens"):
        answers(tiny, {}, ["x", ""], max_new_tokens=6)
    room = tiny.config.context_length - 6
    with pytest.raises(ValueError, match=f"prompt 0 has {room + 1} tokens: expected 1 to {room}"):
        answers(tiny, {}, ["x" * (room + 1)], max_new_tokens=6)
    broken = {**tiny.params, "norm": jnp.full_like(tiny.params["norm"], jnp.nan)}
    with pytest.raises(ValueError, match="logits after prompt 0 are not numbers"):
        answers(dataclasses.replace(tiny, params=broken), {}, ["x"], max_new_tokens=6)
