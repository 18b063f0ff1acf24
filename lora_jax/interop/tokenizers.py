"""Tokenizers out of checkpoints: from a GGUF's metadata, and from a Hugging Face folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Core

from lora_jax.data.tokenizer import Tokenizer
from lora_jax.interop.read_json import read_json

_CONTROL, _USER_DEFINED = 3, 4
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = ("smollm", "gpt-2", "llama-bpe", "qwen2")


def tokenizer_from_gguf(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds a byte-level BPE tokenizer from the `tokenizer.*` metadata of the GGUF at `path`.

    Raises:
      ValueError: the metadata is incomplete, or describes another kind of tokenizer.
    """
    entries = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    _check(path, entries)
    pre, tokens, kinds = entries["pre"], entries["tokens"], entries["token_type"]
    core = _byte_level_bpe(path, pre, tokens, entries["merges"])
    core.add_special_tokens(_added(tokens, kinds, _CONTROL))
    core.add_tokens(_added(tokens, kinds, _USER_DEFINED))
    bos_id = entries.get("bos_token_id")
    # llama.cpp adds it for `llama-bpe` unless the file says otherwise.
    if bos_id is not None and entries.get("add_bos_token", pre == "llama-bpe"):
        core.post_processor = _prepend(tokens[bos_id], bos_id)
    return Tokenizer(
        core=core,
        chat_template=metadata.get("tokenizer.chat_template"),
        bos_id=bos_id,
        eos_id=entries["eos_token_id"],
        pad_id=entries.get("padding_token_id"),
    )


def _check(path: Path, entries: Mapping[str, Any]) -> None:
    for key in ("model", "pre", "tokens", "token_type", "merges", "eos_token_id"):
        if key not in entries:
            raise ValueError(f"{path} lacks tokenizer.ggml.{key}: it holds no whole tokenizer.")
    if entries["model"] != "gpt2" or entries["pre"] not in _PRE_TOKENIZERS:
        raise ValueError(
            f"{path}: the tokenizer {entries['model']!r} with the pre-tokenizer {entries['pre']!r} "
            f"is not supported; supported: 'gpt2' with one of {', '.join(_PRE_TOKENIZERS)}. "
            "Load the model's Hugging Face folder instead: its tokenizer.json says all."
        )
    tokens, kinds = entries["tokens"], entries["token_type"]
    if len(tokens) != len(kinds):
        raise ValueError(f"{path} is corrupt: {len(tokens)} tokens but {len(kinds)} token types.")
    for key in ("bos_token_id", "eos_token_id", "padding_token_id"):
        token_id = entries.get(key, 0)
        if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
            raise ValueError(f"{path} is corrupt: {key} is {token_id!r} of {len(tokens)} tokens.")


def _byte_level_bpe(path: Path, pre: str, tokens: list[str], merges: list[str]) -> Core:
    pairs: Any = [tuple(merge.split(" ")) for merge in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        core = Core(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the Rust library raises bare Exception
        raise ValueError(f"{path} is corrupt: its tokenizer's merges fail: {error}") from None
    if pre == "qwen2":
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = _pre_tokenizer(pre)
    core.decoder = decoders.ByteLevel()
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
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, its_kind in zip(tokens, kinds, strict=True)
        if its_kind == kind
    ]


def _prepend(token: str, token_id: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, token_id)]
    )


def tokenizer_from_huggingface(folder: Path) -> Tokenizer:
    """Reads tokenizer.json and its companions in a Hugging Face folder.

    The end token is tokenizer_config.json's, else generation_config.json's; the chat template is
    chat_template.jinja, else tokenizer_config.json's.

    Raises:
      FileNotFoundError: there is no tokenizer.json.
      ValueError: a file does not parse, or names no end token.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json. Download the whole repository, or save one with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    try:
        core = Core.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer: {error}") from None
    settings = read_json(folder / "tokenizer_config.json")
    eos_id = _token_id(core, settings.get("eos_token"))
    if eos_id is None:
        eos_id = _generation_eos(folder)
    return Tokenizer(
        core=core,
        chat_template=_chat_template(folder, settings),
        bos_id=_token_id(core, settings.get("bos_token")),
        eos_id=eos_id,
        pad_id=_token_id(core, settings.get("pad_token")),
    )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, source: str) -> None:
    """Raises ValueError if the tokenizer may yield an id that the embedding has no row for."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{source}: the tokenizer yields {tokenizer.vocab_size} tokens, more than the model's "
            f"vocabulary of {vocab_size}; they belong to different models, or tokens were added "
            "without resizing the embedding."
        )


def _token_id(core: Core, token: str | dict | None) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return None if text is None else core.token_to_id(text)


def _generation_eos(folder: Path) -> int:
    eos = read_json(folder / "generation_config.json").get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if not isinstance(eos, int):
        raise ValueError(
            f"{folder} names no end token: neither eos_token in tokenizer_config.json nor "
            "eos_token_id in generation_config.json. Add one of them."
        )
    return eos


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {item["name"]: item["template"] for item in template}.get("default")
    return template
