"""Words and METEOR beside the programs themselves, which the wheel `pycocoevalcap` holds."""

import importlib.util
import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

if shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None:
    pytest.skip("wants java and pycocoevalcap", allow_module_level=True)

from experiments.scores import meteor, ptb, scores
from lora_jax import data

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden/e2e_scores.json").read_text(encoding="utf-8")
)
PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
TRICKY = """
it's can't Cannot won't I'd've he'll they're y'all o'clock O'Neill's d'Art 'tis rock'n'roll kids'
£20-25 £20-£25 £1,000.50 $5 €30 20p 50% 3/5 1/5/2 3 1/2 10:30am 10.30pm 6-9pm 7am-11pm .5 -5 1990s
Mr. Mrs. St. No. 5 etc., e.g. i.e. U.S. U.K.'s a.m. p.m. Ltd. Ave. approx. Ph.D. vs. J. Smith
(a) [b] {c} "d" 'e' “f” ‘g’ <h> … — – - -- !!! ?! ;) :-( ** # & &amp; AT&T B&B C++ a/b and/or x.y
family-friendly non-family-friendly. 5-a-day word,word word;word word.Word place!The centre.near
café naïve Zürich ½ ★ 日本 a@b.com @user #tag http://www.x.com/a. www.x.com, end.
"""


def official(texts, folder):
    """The caption scorer's words of each text."""
    jar = meteor.jar().parents[1] / "tokenizer/stanford-corenlp-3.4.1.jar"
    (folder / "texts").write_text("\n".join(texts) + "\n", encoding="utf-8")
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar)]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    said = subprocess.run([*command, str(folder / "texts")], capture_output=True, check=True)
    lines = said.stdout.decode().split("\n")[: len(texts)]
    return [[word for word in line.split(" ") if word not in PUNCTUATION | {""}] for line in lines]


def test_words_are_those_of_the_tokenizer(tmp_path):
    pick = random.Random(0)
    records = data.load_source("restaurants", split="validation", cache_dir=tmp_path)
    texts = [record["messages"][-1]["content"] for record in records]
    tricky = TRICKY.split()
    texts += [" ".join(pick.choices(tricky, k=12)) + " end" for _ in range(500)]
    texts = [line for text in texts for line in text.splitlines() if line.strip()]
    for text, words in zip(texts, official(texts, tmp_path), strict=True):
        assert ptb.words(text) == words, text


def test_meteor_is_the_official_one_to_the_printed_digits():
    found = scores(*zip(*((i["output"], i["references"]) for i in GOLDEN["items"]), strict=True))
    assert {name: f"{score:.4f}" for name, score in found.items()} == GOLDEN["scores"]
