import json
import os
import subprocess
import sys
import time

import pytest

from lora_jax.data import HeldOut, load_source
from lora_jax.data.records import Corpus, conversation
from lora_jax.data.sources import default_cache_dir


def messages(prompt, response, system="Describe the restaurant."):
    return conversation(prompt, response, system=system)


@pytest.fixture
def load(tmp_path):
    def load(name, path=None, split="train", **options):
        return load_source(name, split=split, path=path, cache_dir=tmp_path / "cache", **options)

    return load


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text, encoding="utf-8")
    return folder


def test_restaurants_are_a_sequence_read_back_in_order(load):
    from lora_jax.data.restaurants import corpus

    source = load("restaurants", split="validation")
    expected = list(corpus().splits["validation"]())
    assert len(source) == 400
    assert list(source) == expected
    assert [source[0], source[-1]] == [expected[0], expected[-1]]
    assert source[3:6] == expected[3:6]
    with pytest.raises(IndexError):
        source[400]


def test_imports_are_lazy_nothing_is_printed_and_tensorflow_stays_away(tmp_path):
    script = (
        "import sys; from lora_jax.data import HeldOut, load_source;"
        "assert 'tensorflow_datasets' not in sys.modules;"
        f"load_source('restaurants', split='test', cache_dir={str(tmp_path)!r});"
        "assert not {'tensorflow', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("LORA_JAX_CACHE")
    assert default_cache_dir().parts[-2:] == (".cache", "lora_jax")


def test_e2e_text_layout(load, tmp_path):
    folder = write(
        tmp_path / "e2e",
        train_txt="name : A | food : B||A serves B .  \nname : Café||A café .\n",
        valid_txt="name : C||C .\n",
        test_txt="name : D||D .\n",
    )
    assert list(load("e2e", folder)) == [
        messages("name : A | food : B", "A serves B ."),
        messages("name : Café", "A café ."),
    ]
    assert list(load("e2e", folder, "validation")) == [messages("name : C", "C .")]
    assert list(load("e2e", folder, "test")) == [messages("name : D", "D .")]


def test_a_beginning_of_e2es_validation_split_is_a_sample_of_its_meanings(load, tmp_path):
    lines = [("A", "1"), ("A", "2"), ("A", "3"), ("B", "4"), ("C", "5"), ("C", "6"), ("A", "7")]
    text = "".join(f"{meaning}||{reference}\n" for meaning, reference in lines)
    folder = write(tmp_path / "e2e", train_txt=text, valid_txt=text, test_txt=text)
    found = [record["messages"][-1]["content"] for record in load("e2e", folder, "validation")]
    assert "".join(found) == "1452637"
    for split in ("train", "test"):
        kept = [record["messages"][-1]["content"] for record in load("e2e", folder, split)]
        assert "".join(kept) == "1234567"  # as the file has them


def test_e2e_csv_layout(load, tmp_path):
    folder = write(
        tmp_path / "e2e",
        trainset_csv='mr,ref\n"name[A], food[B]","A serves B, ""hot""."\n',
        devset_csv='mr,ref\nname[C],"two\nlines"\n',
    )
    assert list(load("e2e", folder)) == [messages("name[A], food[B]", 'A serves B, "hot".')]
    assert list(load("e2e", folder, "validation")) == [messages("name[C]", "two\nlines")]
    with pytest.raises(ValueError, match="e2e has no split 'test'; it has train, validation"):
        load("e2e", folder, "test")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train_txt": "a||b\nno separator\n"}, r"train\.txt:2: expected `MR\|\|reference`"),
        ({"train_txt": "a||b\n||b\n"}, r"train\.txt:2: the meaning representation is empty"),
        ({"train_txt": "a|| \n"}, r"train\.txt:1: the reference is empty"),
        ({"train_txt": ""}, r"train\.txt is empty"),
        ({"trainset_csv": "mr,text\na,b\n"}, r"trainset\.csv:1: expected the columns mr and ref"),
        ({"trainset_csv": "mr,ref\na,b\nc\n"}, r"trainset\.csv:3: the reference is empty"),
        ({"trainset_csv": "mr,ref\n"}, r"trainset\.csv is empty"),
        ({"trainset_csv": ""}, r"expected the columns mr and ref, found None"),
        ({"valid_txt": "a||b\n"}, r"No E2E data in .*train\.txt, valid\.txt, test\.txt"),
    ],
)
def test_bad_e2e(load, tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        load("e2e", write(tmp_path / "e2e", **files))


def test_jsonl_shapes_of_a_line(load, tmp_path):
    chat = {"messages": [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "c"}]}
    rows = [{"prompt": "p", "response": "r"}, {"prompt": "q", "completion": "s"}, chat]
    folder = tmp_path / "d"
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write(folder, train_jsonl=text, valid_jsonl=json.dumps(rows[0]), test_jsonl=text)
    expected = [conversation("p", "r"), conversation("q", "s"), chat]
    assert list(load("jsonl", folder)) == list(load("jsonl", folder, "test")) == expected
    assert list(load("jsonl", folder, "validation")) == expected[:1]


@pytest.mark.parametrize(("total", "held_out"), [(2, 1), (39, 1), (40, 2), (100, 5)])
def test_one_jsonl_file_holds_out_its_end(load, tmp_path, total, held_out):
    file = tmp_path / "all.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": str(i), "response": "r"}) + "\n" for i in range(total))
    )
    train, validation = load("jsonl", file), load("jsonl", file, "validation")
    assert len(validation) == held_out
    prompts = [record["messages"][0]["content"] for record in (*train, *validation)]
    assert prompts == [str(i) for i in range(total)]
    with pytest.raises(ValueError, match="jsonl has no split 'test'; it has train, validation"):
        load("jsonl", file, "test")


def lines(file, total):
    rows = [json.dumps({"prompt": str(i), "response": "r"}) for i in range(total)]
    file.write_text("\n".join(rows) + "\n")
    return file


@pytest.mark.parametrize(("total", "held_out"), [(8, 4), (40, 4), (100, 10), (900, 32)])
def test_a_seeded_share_is_held_out(tmp_path, total, held_out):
    """A tenth, at least 4 and at most 32; every line is in one split, in the file's order."""
    file = lines(tmp_path / "all.jsonl", total)

    def split(name, seed):
        how = HeldOut(share=0.1, most=32, seed=seed)
        found = load_source(
            "jsonl", split=name, path=file, cache_dir=tmp_path / "cache", held_out=how
        )
        return [int(record["messages"][0]["content"]) for record in found]

    train, validation = split("train", 0), split("validation", 0)
    assert len(validation) == held_out and sorted(train + validation) == list(range(total))
    assert train == sorted(train) and validation == sorted(validation)
    assert split("validation", 1) != validation == split("validation", 0)


def test_validation_of_a_file_of_its_own(tmp_path):
    file, other = lines(tmp_path / "a.jsonl", 3), lines(tmp_path / "b.jsonl", 2)
    how = {"path": file, "cache_dir": tmp_path / "cache", "validation_path": other}
    how["held_out"] = HeldOut(share=0.1, most=32, seed=0)  # there is no need of it
    found = [len(load_source("jsonl", split=s, **how)) for s in ("train", "validation")]
    assert found == [3, 2]


OK = '{"prompt": "p", "response": "r"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OK + OK + "{oops\n", r"data\.jsonl:3: not valid JSON, column 2: Expecting"),
        (OK + "[1]\n", r"data\.jsonl:2: expected a JSON object, found list"),
        (OK + '{"prompt": "p"}\n', r"data\.jsonl:2: expected the strings `prompt` .* \['prompt'\]"),
        (OK + '{"prompt": 1, "response": "r"}\n', r"data\.jsonl:2: expected the strings"),
        (OK + '{"prompt": "p", "response": " "}\n', r"data\.jsonl:2: the response is empty"),
        (
            OK + '{"messages": "hi"}\n',
            r"data\.jsonl:2: expected `messages` to be a list, found str",
        ),
        (
            OK + '{"messages": [{"role": "user"}]}\n',
            r"data\.jsonl:2: messages\[0\] must be an object",
        ),
        (OK + '{"messages": []}\n', r"data\.jsonl:2: no message has the role `assistant`"),
        ("", r"data\.jsonl is empty"),
        ("\n \n", r"data\.jsonl is empty"),
        (OK, r"data\.jsonl has a single example"),
    ],
)
def test_bad_jsonl(load, tmp_path, text, message):
    file = tmp_path / "data.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load("jsonl", file)
    assert not any((tmp_path / "cache" / "tfds").iterdir())


def test_not_utf8(load, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"data\.jsonl is not UTF-8 text"):
        load("jsonl", file)


def test_bad_requests(load, tmp_path):
    with pytest.raises(ValueError, match="Unknown source 'e3e': expected restaurants, e2e, jsonl"):
        load("e3e")
    with pytest.raises(ValueError, match="restaurants has no split 'dev'; it has train, valid"):
        load("restaurants", split="dev")
    with pytest.raises(ValueError, match="Source 'jsonl' is read from disk: give its path"):
        load("jsonl")
    with pytest.raises(ValueError, match=r"No JSONL data at .*nowhere: expected a \.jsonl file"):
        load("jsonl", tmp_path / "nowhere")


def test_an_edited_file_is_read_anew(load, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(OK * 2)
    old = load("jsonl", file)
    file.write_text(OK * 3)
    os.utime(file, (0, 0))
    assert (len(old), len(load("jsonl", file))) == (1, 2)


def slow_corpus(records):
    def read():
        for index in range(records):
            time.sleep(0.01)
            yield conversation(str(index), "r")

    return Corpus(name="slow", fingerprint="f" * 64, splits={"train": read})


@pytest.mark.slow
def test_two_prepare_at_once_and_one_is_killed_midway(tmp_path):
    from lora_jax.data.prepared import open_split

    script = (
        f"import sys, pathlib; sys.path.insert(0, {os.path.dirname(__file__)!r});"
        "from test_data_sources import slow_corpus; from lora_jax.data.prepared import open_split;"
        f"open_split(slow_corpus(10_000), 'train', pathlib.Path({str(tmp_path)!r}))"
    )
    other = subprocess.Popen([sys.executable, "-c", script])
    while not list(tmp_path.glob("tfds/.preparing-*/records/*")):
        assert other.poll() is None
        time.sleep(0.05)
    assert len(open_split(slow_corpus(3), "train", tmp_path)) == 3
    assert other.poll() is None
    other.kill()
    other.wait()
    assert len(open_split(slow_corpus(3), "train", tmp_path)) == 3


def test_losing_the_race_serves_what_the_winner_prepared(tmp_path):
    from lora_jax.data.prepared import open_split

    def read_while_another_finishes():
        if not list(tmp_path.glob("tfds/slow-*")):
            open_split(slow_corpus(2), "train", tmp_path)
        yield conversation("late", "r")

    late = Corpus(name="slow", fingerprint="f" * 64, splits={"train": read_while_another_finishes})
    assert len(open_split(late, "train", tmp_path)) == 2


def test_tfds_name_reads_the_chosen_fields(load, monkeypatch):
    import tensorflow_datasets as tfds

    rows = [{"q": b"caf\xc3\xa9", "a": "yes", "n": 3}]
    monkeypatch.setattr(tfds, "data_source", lambda name, **options: rows)
    source = load("tfds:some", prompt_field="q", response_field="a")
    assert list(source) == [conversation("café", "yes")]
    with pytest.raises(
        ValueError, match=r"tfds:some has no field 'b'; its fields: \['a', 'n', 'q'\]"
    ):
        load("tfds:some", prompt_field="q", response_field="b")
    with pytest.raises(ValueError, match="tfds:some needs prompt_field and response_field"):
        load("tfds:some", prompt_field="q")


def test_tfds_name_that_cannot_be_had(load, monkeypatch):
    import tensorflow_datasets as tfds

    options = {"prompt_field": "q", "response_field": "a"}
    with pytest.raises(ValueError, match=r"Cannot read tfds:no_such_set, .*\bnot found.*JSONL"):
        load("tfds:no_such_set", **options)

    def offline(name, **options):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(tfds, "data_source", offline)
    with pytest.raises(ValueError, match="ConnectionError: no route to host Check the name"):
        load("tfds:glue", **options)
