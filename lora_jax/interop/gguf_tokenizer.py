"""Tokenizers in the metadata of GGUF files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Core

from lora_jax.data.tokenizer import Tokenizer
from lora_jax.interop.gguf_sentencepiece import (
    CONTROL,
    HUGGINGFACE_JSON,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    is_sentencepiece,
    sentencepiece_core,
    sentencepiece_entries,
    with_defaults,
)

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITTING = ("normalizer", "pre_tokenizer")
_PRE_TOKENIZERS = ("smollm", "gpt-2", "llama-bpe", "qwen2")


def tokenizer_from_gguf(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer, byte-level BPE or SentencePiece, from the `tokenizer.*` metadata of
    the GGUF at `path`.

    Raises:
      ValueError: the metadata is incomplete, or describes another kind of tokenizer.
    """
    entries = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    if entries.get("model") == "llama":
        entries = with_defaults(entries)
        _check(path, entries, ("tokens", "token_type", "scores"))
        core = sentencepiece_core(path, entries, metadata.get(HUGGINGFACE_JSON))
    else:
        _check(path, entries, ("model", "pre", "tokens", "token_type", "merges", "eos_token_id"))
        # llama.cpp adds the beginning for `llama-bpe` unless the file says otherwise.
        entries.setdefault("add_bos_token", entries["pre"] == "llama-bpe")
        core = _byte_level_core(path, entries)
    core.post_processor = _around(entries)
    return Tokenizer(
        core=core,
        chat_template=metadata.get("tokenizer.chat_template"),
        bos_id=entries.get("bos_token_id"),
        eos_id=entries["eos_token_id"],
        pad_id=entries.get("padding_token_id"),
    )


def _check(path: Path, entries: Mapping[str, Any], needed: Sequence[str]) -> None:
    for key in needed:
        if key not in entries:
            raise ValueError(f"{path} lacks tokenizer.ggml.{key}: it holds no complete tokenizer.")
    model = entries["model"]
    if model not in ("gpt2", "llama") or (
        model == "gpt2" and entries["pre"] not in _PRE_TOKENIZERS
    ):
        raise ValueError(
            f"{path}: the tokenizer {model!r} with the pre-tokenizer {entries['pre']!r} is not "
            f"supported; supported: 'llama', and 'gpt2' with one of {', '.join(_PRE_TOKENIZERS)}. "
            "Load the model's Hugging Face folder instead: its tokenizer.json says all."
        )
    for key in ("add_sep_token", "remove_extra_whitespaces"):
        if entries.get(key):
            raise ValueError(f"{path}: tokenizer.ggml.{key} is not supported in {model!r}.")
    tokens, kinds = entries["tokens"], entries["token_type"]
    if len(tokens) != len(kinds):
        raise ValueError(f"{path} is corrupt: {len(tokens)} tokens but {len(kinds)} token types.")
    for key in ("bos_token_id", "eos_token_id", "padding_token_id", "unknown_token_id"):
        token_id = entries.get(key, 0)
        if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
            raise ValueError(f"{path} is corrupt: {key} is {token_id!r} of {len(tokens)} tokens.")


def _byte_level_core(path: Path, entries: Mapping[str, Any]) -> Core:
    tokens, kinds = entries["tokens"], entries["token_type"]
    core = _byte_level_bpe(path, entries["pre"], tokens, entries["merges"])
    core.add_special_tokens(_added(tokens, kinds, CONTROL))
    core.add_tokens(_added(tokens, kinds, USER_DEFINED))
    return core


def _around(entries: Mapping[str, Any]) -> processors.TemplateProcessing | None:
    """The special tokens before and after a text, where an encoding adds them."""
    ends = [
        (entries["tokens"][entries[f"{end}_token_id"]], entries[f"{end}_token_id"])
        if entries.get(f"add_{end}_token") and entries.get(f"{end}_token_id") is not None
        else None
        for end in ("bos", "eos")
    ]
    if ends == [None, None]:
        return None
    first, last = ([end[0]] if end else [] for end in ends)
    return processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *first, "$B", *last],
        special_tokens=list(dict.fromkeys(end for end in ends if end)),
    )


def _byte_level_bpe(path: Path, pre: str, tokens: list[str], merges: list[str]) -> Core:
    pairs: Any = [tuple(merge.split(" ")) for merge in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        core = Core(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the Rust library raises bare Exception
        raise ValueError(f"{path} is corrupt: its tokenizer's merges fail: {error}") from None
    core.decoder = decoders.ByteLevel()
    return _with_splitting(core, pre)


def _with_splitting(core: Core, pre: str) -> Core:
    if pre == "qwen2":
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = _pre_tokenizer(pre)
    return core


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    if pre == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return pre_tokenizers.Sequence([digits, gpt2])
    number = r"\p{N}{1,3}" if pre == "llama-bpe" else r"\p{N}"
    pattern = Regex(_LLAMA3_SPLIT.replace(r"\p{N}{1,3}", number))
    split = pre_tokenizers.Split(pattern, behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, bytes_only])


def _added(tokens: list[str], kinds: list[int], kind: int) -> list[AddedToken]:
    return [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, its_kind in zip(tokens, kinds, strict=True)
        if its_kind == kind
    ]


def tokenizer_to_gguf(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.*` metadata of a GGUF: what `tokenizer_from_gguf` reads.

    Rows of the embedding without a token get the type for unused ones; tokens without a row are
    left out.

    Raises:
      ValueError: the tokenizer is neither byte-level BPE nor SentencePiece's, or splits words as no
        supported one does.
    """
    core = json.loads(tokenizer.core.to_str())
    full_json = None
    if is_sentencepiece(core):
        entries, full_json = sentencepiece_entries(tokenizer.core, vocab_size)
    elif core["model"]["type"] == "BPE":
        entries = _byte_level_entries(tokenizer.core, core, vocab_size)
    else:
        raise ValueError(
            "GGUF export takes BPE tokenizers, byte-level (as GPT-2's: SmolLM2, Llama 3, Qwen) "
            f"or SentencePiece's (Llama 2, Mistral), but this one is {core['model']['type']}. "
            "Export a Hugging Face folder instead."
        )
    ids = tokenizer.core.encode("a").ids
    entries |= {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "padding_token_id": tokenizer.pad_id,
        "add_bos_token": tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id],
        "add_eos_token": ids[-1:] == [tokenizer.eos_id],
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in entries.items()}
    metadata["tokenizer.chat_template"] = tokenizer.chat_template
    metadata[HUGGINGFACE_JSON] = full_json
    return {key: value for key, value in metadata.items() if value is not None}


def _byte_level_entries(core: Core, parsed: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for token, token_id in core.get_vocab(with_added_tokens=True).items():
        if token_id < vocab_size:
            tokens[token_id], kinds[token_id] = token, NORMAL
    for token_id, added in core.get_added_tokens_decoder().items():
        if token_id < vocab_size:
            kinds[token_id] = CONTROL if added.special else USER_DEFINED
    merges = parsed["model"]["merges"]
    return {
        "model": "gpt2",
        "pre": _pre_of(parsed),
        "tokens": tokens,
        "token_type": kinds,
        "merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in merges],
    }


def _pre_of(core: Mapping[str, Any]) -> str:
    """The name of llama.cpp for the way in which the tokenizer's JSON splits a text."""
    for pre in _PRE_TOKENIZERS:
        built = json.loads(_with_splitting(Core(models.BPE()), pre).to_str())
        if all(_plain(core[part]) == _plain(built[part]) for part in _SPLITTING):
            return pre
    raise ValueError(
        f"GGUF names ways to split a text, and this tokenizer's is none of "
        f"{', '.join(_PRE_TOKENIZERS)}. Export a Hugging Face folder instead."
    )


def _plain(part: Any) -> Any:
    """Without settings that affect only offsets of tokens; a sequence of one step as that step."""
    if not isinstance(part, dict):
        return part
    for steps in ("pretokenizers", "normalizers"):
        if steps in part:
            plain = [_plain(step) for step in part[steps]]
            return plain[0] if len(plain) == 1 else plain
    return {key: value for key, value in part.items() if key != "trim_offsets"}
