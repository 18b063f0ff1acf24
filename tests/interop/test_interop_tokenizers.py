"""Tokenizers out of checkpoints."""

import dataclasses
import json
from pathlib import Path

import pytest
import small_checkpoints
import tokenizers

from lora_jax.data.tokenizer import byte_tokenizer
from lora_jax.interop.gguf_tokenizer import tokenizer_from_gguf, tokenizer_to_gguf
from lora_jax.interop.tokenizers import fit_vocabulary, tokenizer_from_huggingface

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "smollm2_tokens.json").read_text())
ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def metadata(pre: str, /, **changes) -> dict:
    entries = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*ALPHABET, "12", "<s>", "</s>", "<tool>"],
        "token_type": [1] * 257 + [3, 3, 4],
        "merges": ["1 2"],
        "bos_token_id": 257,
        "eos_token_id": 258,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (entries | changes).items()}


def pieces(pre: str, text: str) -> list[str]:
    core = tokenizer_from_gguf(Path("x.gguf"), metadata(pre)).core
    return [piece for piece, _ in core.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.network
@pytest.mark.parametrize("case", GOLDEN["strings"], ids=lambda case: repr(case["text"][:12]))
def test_ids_agree_with_transformers(smollm2, case):
    ids = smollm2.tokenizer.encode(case["text"])
    assert ids == case["ids"]
    assert smollm2.tokenizer.decode(ids) == case["text"]


@pytest.mark.network
def test_what_the_gguf_says_beside_the_vocabulary(smollm2):
    tokenizer = smollm2.tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.vocab_size == smollm2.config.vocab_size == 49_152
    assert "<|im_start|>" in tokenizer.chat_template
    assert tokenizer.decode([1, 19556, 2], skip_special_tokens=True) == "Hello"


def test_pre_tokenizers_split_digits_in_their_own_way():
    assert pieces("gpt-2", "a 1234") == ["a", "Ġ1234"]
    assert pieces("smollm", "a 1234") == ["a", "Ġ", "1", "2", "3", "4"]
    assert pieces("llama-bpe", "a 1234") == ["a", "Ġ", "123", "4"]
    assert pieces("qwen2", "a 1234") == ["a", "Ġ", "1", "2", "3", "4"]


def test_control_tokens_are_special_and_user_tokens_are_not():
    tokenizer = tokenizer_from_gguf(Path("x.gguf"), metadata("gpt-2"))
    ids = tokenizer.encode("<s>12<tool>")
    assert ids == [257, 256, 259]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "12<tool>"


@pytest.mark.parametrize(("pre", "added"), [("llama-bpe", True), ("gpt-2", False)])
def test_beginning_token_where_the_file_or_its_kind_says_so(pre, added):
    core = tokenizer_from_gguf(Path("x.gguf"), metadata(pre)).core
    assert (core.encode("12").ids[0] == 257) is added


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "bert"},
            r"x\.gguf: the tokenizer 'bert' .* 'llama', and 'gpt2' with",
        ),
        ({"model": "llama"}, r"x\.gguf lacks tokenizer\.ggml\.scores"),
        ({"add_sep_token": True}, r"tokenizer\.ggml\.add_sep_token is not supported in 'gpt2'"),
        ({"pre": "tekken"}, r"pre-tokenizer 'tekken' is not supported"),
        ({"merges": ["1 zzz"]}, r"x\.gguf is corrupt: its tokenizer's merges fail"),
        ({"merges": ["12"]}, r"x\.gguf is corrupt"),
        ({"token_type": [1]}, r"x\.gguf is corrupt: 260 tokens but 1 token types"),
        ({"bos_token_id": 999}, r"x\.gguf is corrupt: bos_token_id is 999"),
    ],
)
def test_unsupported_or_corrupt_metadata(changes, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf(Path("x.gguf"), metadata("gpt-2", **changes))


def test_incomplete_metadata():
    entries = metadata("gpt-2")
    del entries["tokenizer.ggml.eos_token_id"]
    with pytest.raises(ValueError, match=r"lacks tokenizer\.ggml\.eos_token_id"):
        tokenizer_from_gguf(Path("x.gguf"), entries)


def huggingface(folder: Path, settings: dict) -> Path:
    byte_tokenizer().core.save(str(folder / "tokenizer.json"))
    small_checkpoints.write_json(folder / "tokenizer_config.json", settings)
    return folder


def test_huggingface_special_tokens_and_template(tmp_path):
    settings = {
        "bos_token": {"content": "<|im_start|>", "lstrip": False},
        "eos_token": "<|im_end|>",
        "pad_token": None,
        "chat_template": [
            {"name": "tools", "template": "t"},
            {"name": "default", "template": "d"},
        ],
    }
    tokenizer = tokenizer_from_huggingface(huggingface(tmp_path, settings))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (256, 257, None)
    assert tokenizer.chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("own file")
    assert tokenizer_from_huggingface(tmp_path).chat_template == "own file"


@pytest.mark.parametrize("eos", [258, [258, 1]])
def test_huggingface_end_token_of_the_generation_config(tmp_path, eos):
    huggingface(tmp_path, {})
    small_checkpoints.write_json(tmp_path / "generation_config.json", {"eos_token_id": eos})
    assert tokenizer_from_huggingface(tmp_path).eos_id == 258


def test_huggingface_without_end_token(tmp_path):
    with pytest.raises(ValueError, match=r"names no end token"):
        tokenizer_from_huggingface(huggingface(tmp_path, {}))


def test_huggingface_without_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        tokenizer_from_huggingface(tmp_path)


def test_huggingface_corrupt_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        tokenizer_from_huggingface(tmp_path)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_metadata_of_a_tokenizer_is_what_it_was_read_from(pre):
    entries = metadata(pre) | {"tokenizer.chat_template": "{{ messages }}"}
    tokenizer = tokenizer_from_gguf(Path("x.gguf"), entries)
    written = tokenizer_to_gguf(tokenizer, 262)
    filled = {"tokens": ["[PAD260]", "[PAD261]"], "token_type": [5, 5]}
    for key, more in filled.items():
        assert written[f"tokenizer.ggml.{key}"] == entries[f"tokenizer.ggml.{key}"] + more
    assert written["tokenizer.ggml.add_bos_token"] == (pre == "llama-bpe")
    same = entries.keys() - {f"tokenizer.ggml.{key}" for key in filled}
    assert {key: written[key] for key in same} == {key: entries[key] for key in same}


def test_tokenizers_that_gguf_cannot_name():
    with pytest.raises(ValueError, match=r"is none of smollm, gpt-2, llama-bpe, qwen2"):
        tokenizer_to_gguf(byte_tokenizer(), 259)
    for model, message in [
        (tokenizers.models.BPE(byte_fallback=True), "None and pre-tokenizer None are not Llama's"),
        (tokenizers.models.Unigram(), "takes BPE tokenizers, .* this one is Unigram"),
    ]:
        spelt = dataclasses.replace(byte_tokenizer(), core=tokenizers.Tokenizer(model))
        with pytest.raises(ValueError, match=message):
            tokenizer_to_gguf(spelt, 259)


def test_end_token_where_the_file_says_so():
    core = tokenizer_from_gguf(Path("x.gguf"), metadata("gpt-2", add_eos_token=True)).core
    assert core.encode("12").ids == [256, 258]


def test_added_tokens_without_a_row():
    """One or more of them are known, and refused in a text; a padding token is nobody's."""
    tokenizer = byte_tokenizer()
    tokenizer.core.add_tokens(["<more>"])
    fitted = fit_vocabulary(tokenizer, 258, "here")
    assert (fitted.vocab_size, fitted.pad_id, fitted.eos_id) == (258, None, 257)
    assert fitted.encode("ab<|im_end|>") == tokenizer.encode("ab<|im_end|>")
    for text, token_id in {"a<|pad|>": 258, "<more>": 259}.items():
        for encode in (fitted.encode, fitted.encode_with_offsets):
            with pytest.raises(ValueError, match=rf"id {token_id}, .* embedding has 258 rows"):
                encode(text)
    same = fit_vocabulary(tokenizer, 400, "here")
    assert same == tokenizer and same.encode("<more>") == [259]
    for rows, message in {257: "eos_id is 257, outside", 200: "belong to different models"}.items():
        with pytest.raises(ValueError, match=rf"here: .*{message}"):
            fit_vocabulary(tokenizer, rows, "here")
