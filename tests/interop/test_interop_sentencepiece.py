"""SentencePiece tokenizers in GGUF files: what they make of texts, and the way back."""

import itertools
import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest
import small_checkpoints
import small_llamas
import small_sentencepiece as small
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from lora_jax.data.tokenizer import Tokenizer as OurTokenizer
from lora_jax.interop import load_gguf, load_huggingface, save_gguf, save_huggingface
from lora_jax.interop.gguf_tokenizer import tokenizer_from_gguf, tokenizer_to_gguf

PATH, SIZE = Path("x.gguf"), len(small.TOKENS)


def read(**changes) -> OurTokenizer:
    return tokenizer_from_gguf(PATH, small.entries(**changes))


def with_core(edit) -> OurTokenizer:
    """The small tokenizer, its tokenizer.json edited."""
    tokenizer = read()
    parsed = json.loads(tokenizer.core.to_str())
    edit(parsed)
    core = Tokenizer.from_str(json.dumps(parsed))
    return OurTokenizer(core=core, chat_template=None, bos_id=1, eos_id=2, pad_id=None)


def sentencepiece(text: str) -> list[str]:
    """The pieces of a text without special tokens, by the algorithm's own words."""
    scores = dict(zip(small.PIECES, small.SCORES[259:], strict=False))
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joined = [(scores[a + b], -i) for i, (a, b) in enumerate(pairs(parts)) if a + b in scores]
        if not joined:
            break
        at = -max(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [piece for part in parts for piece in spelt(part, scores)]


def pairs(parts: list[str]) -> list[tuple[str, str]]:
    return list(itertools.pairwise(parts))


def spelt(part: str, scores: dict[str, float]) -> list[str]:
    return [part] if part in scores else [f"<0x{byte:02X}>" for byte in part.encode()]


def test_ids_of_many_texts():
    tokenizer = read()
    assert [tokenizer.encode(text) for text in small.TEXTS] == small.GOLDEN
    for text in small.TEXTS[:9]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode("<s>the<tool>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the<tool>"


def test_pieces_of_random_texts_are_those_of_the_algorithm():
    tokenizer, draw = read(), random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices("   thethein a and er é语\nx▁", k=draw.randrange(24)))
        assert tokenizer.core.encode(text, add_special_tokens=False).tokens == sentencepiece(text)


def test_offsets_are_those_of_the_text():
    ids, offsets = read().encode_with_offsets("the and\nin")
    assert [small.TOKENS[i] for i in ids] == ["▁the", "▁and", "<0x0A>", "in"]
    assert offsets == [(0, 3), (3, 7), (7, 8), (8, 10)]


@pytest.mark.parametrize(
    ("changes", "first", "last"),
    [
        ({}, 1, 269),
        ({"add_bos_token": False}, 269, 269),
        ({"add_eos_token": True}, 1, 2),
        ({"add_space_prefix": False, "add_bos_token": False}, 273, 270),
    ],
)
def test_what_is_put_around_a_text(changes, first, last):
    tokenizer = read(**changes)
    ids = tokenizer.core.encode("the").ids
    assert (ids[0], ids[-1]) == (first, last)
    assert tokenizer.decode(tokenizer.encode("the")) == "the"
    written = tokenizer_to_gguf(tokenizer, SIZE)
    stated = {"add_bos_token": True, "add_eos_token": False, "add_space_prefix": True} | changes
    assert {key: written[f"tokenizer.ggml.{key}"] for key in stated} == stated


def test_ids_that_a_file_leaves_out_are_llamas():
    entries = small.entries()
    for name in ("bos_token_id", "eos_token_id", "unknown_token_id"):
        del entries[f"tokenizer.ggml.{name}"]
    tokenizer = tokenizer_from_gguf(PATH, entries)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.encode("the<unk>and") == [269, 0, 261]


def test_without_byte_tokens_the_rest_is_unknown():
    kept = [i for i, kind in enumerate(small.KINDS) if kind != 6]
    lists = {"tokens": small.TOKENS, "scores": small.SCORES, "token_type": small.KINDS}
    fewer = {key: [values[i] for i in kept] for key, values in lists.items()}
    tokenizer = read(**fewer, padding_token_id=5)
    names = tokenizer.core.encode("the xx and", add_special_tokens=False).tokens
    assert names == ["▁the", "▁", "<unk>", "▁and"]


def test_metadata_of_a_tokenizer_is_what_it_was_read_from():
    written, entries = tokenizer_to_gguf(read(), SIZE + 2), small.entries()
    for key, more in {"tokens": ["[PAD289]", "[PAD290]"], "token_type": [5, 5]}.items():
        assert written[f"tokenizer.ggml.{key}"] == entries[f"tokenizer.ggml.{key}"] + more
    scores = written["tokenizer.ggml.scores"]
    assert scores[:-5] == small.SCORES[:-3]
    assert scores[-5:] == [0.0, -1000.0, 0.0, -10_000.0, -10_000.0]  # those of no normal pieces
    same = ["model", "pre", "bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id"]
    assert all(written[f"tokenizer.ggml.{key}"] == entries[f"tokenizer.ggml.{key}"] for key in same)
    assert "tokenizer.huggingface.json" not in written


def metaspace(scheme: str):
    def edit(parsed):
        part = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
        parsed |= {"normalizer": None, "pre_tokenizer": json.loads(part.__getstate__())}

    return edit


def without_prefix(parsed):
    parsed["normalizer"] = json.loads(normalizers.Replace(" ", "▁").__getstate__())


def unknown_left_out(parsed):
    parsed["model"]["unk_token"] = None


def merges_in_another_order(parsed):
    """Of one piece, as transformers 5 sorts them."""
    merges = parsed["model"]["merges"]
    merges.sort(key=lambda pair: (small.RANKED.index("".join(pair)), -len(pair[0])))


def stripping_token(parsed):
    parsed["added_tokens"][-1]["lstrip"] = True


@pytest.mark.parametrize(
    ("edit", "says_all"),
    [
        (lambda parsed: None, True),
        (without_prefix, True),
        (metaspace("never"), True),
        (metaspace("always"), False),
        (metaspace("first"), False),
        (unknown_left_out, True),
        (merges_in_another_order, True),
        (stripping_token, False),
    ],
)
def test_every_tokenizer_json_of_a_llama_survives(edit, says_all):
    """Where GGUF's own words say less, the whole tokenizer.json travels."""
    tokenizer = with_core(edit)
    written = tokenizer_to_gguf(tokenizer, SIZE)
    assert ("tokenizer.huggingface.json" not in written) == says_all
    again = tokenizer_from_gguf(PATH, written)
    for text in [*small.TEXTS, "the  <tool>"]:
        assert again.encode(text) == tokenizer.encode(text), text


def no_merge(parsed):
    parsed["model"]["merges"].pop(5)


def interleaved_merges(parsed):
    merges = parsed["model"]["merges"]
    merges.insert(0, merges.pop(merges.index(["▁a", "n"])))


def setting(key, value):
    def edit(parsed):
        parsed["model"][key] = value

    return edit


def lowercase(parsed):
    parsed["normalizer"]["normalizers"].append({"type": "Lowercase"})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (no_merge, "SentencePiece would join"),
        (interleaved_merges, "do not follow one another"),
        (setting("byte_fallback", False), "does not fall back to its byte tokens"),
        (setting("ignore_merges", True), "its ignore_merges is True"),
        (lowercase, "its normalizer .* are not Llama's"),
        (metaspace("first"), None),
    ],
)
def test_what_sentencepiece_cannot_say(edit, message):
    if message is None:  # the rest of the file is held to the tokens
        written = tokenizer_to_gguf(with_core(edit), SIZE)
        tokens = [*small.TOKENS[:-2], small.TOKENS[-1], small.TOKENS[-2]]
        with pytest.raises(ValueError, match="contradicts itself: its tokenizer.huggingface.json"):
            tokenizer_from_gguf(PATH, written | {"tokenizer.ggml.tokens": tokens})
        return
    with pytest.raises(ValueError, match=rf"{message}.*Export a Hugging Face folder instead"):
        tokenizer_to_gguf(with_core(edit), SIZE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [0.0]}, r"x\.gguf is corrupt: 289 tokens but 1 scores"),
        ({"token_type": [1]}, r"x\.gguf is corrupt: 289 tokens but 1 token types"),
        ({"tokens": ["<s>", *small.TOKENS[1:]]}, "1 tokens appear twice"),
        ({"token_type": [6, *small.KINDS[1:]]}, "'<unk>' is no byte"),
        ({"unknown_token_id": 289}, "unknown_token_id is 289 of 289 tokens"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is not supported"),
    ],
)
def test_corrupt_or_unsupported_metadata(changes, message):
    with pytest.raises(ValueError, match=message):
        read(**changes)


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_files_and_folders(tmp_path, name):
    """Both ways, weights and tokenizer; query and key rows are llama.cpp's."""
    config = small_llamas.VARIANTS[name] | {"vocab_size": 300}
    weights = small_llamas.draw_weights(config)
    weights = {key: x.astype(np.float16).astype(np.float32) for key, x in weights.items()}
    path = small_checkpoints.write_gguf(
        tmp_path / "m.gguf", config, weights, tokenizer=small.entries()
    )
    model = load_gguf(path)
    folder = small_checkpoints.write_huggingface(tmp_path / "folder", config, weights)
    model.tokenizer.core.save(str(folder / "tokenizer.json"))
    save_gguf(tmp_path / "again.gguf", model)
    save_huggingface(tmp_path / "out", model)
    save_gguf(tmp_path / "out.gguf", load_huggingface(tmp_path / "out"))
    others = [load_huggingface(folder), load_huggingface(tmp_path / "out")]
    others += [load_gguf(tmp_path / "again.gguf"), load_gguf(tmp_path / "out.gguf")]
    for other in others:
        assert other.config == model.config
        jax.tree.map(np.testing.assert_array_equal, other.params, model.params)
        assert [other.tokenizer.encode(text) for text in small.TEXTS] == small.GOLDEN
        assert other.tokenizer.core.encode("the").ids == [1, 269]


def test_tokens_beyond_the_table_are_left_out_of_a_file():
    tokenizer = read()
    tokenizer.core.add_tokens([AddedToken("<more>", special=True)])
    written = tokenizer_to_gguf(tokenizer, SIZE)
    assert written["tokenizer.ggml.tokens"] == small.TOKENS
