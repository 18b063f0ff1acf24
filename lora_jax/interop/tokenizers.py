"""Tokenizers from Hugging Face folders, and whether one fits its model."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Core

from lora_jax.data.tokenizer import Tokenizer
from lora_jax.interop.read_json import read_json

_UNHEARD_OF = "a \ue000"  # meets the unknown token of those that have one


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
    core = _core(path)
    stated = folder / "tokenizer_config.json"
    settings = read_json(stated)
    eos_id = _token_id(core, stated, settings, "eos_token")
    if eos_id is None:
        eos_id = _generation_eos(folder)
    return Tokenizer(
        core=core,
        chat_template=_chat_template(folder, settings),
        bos_id=_token_id(core, stated, settings, "bos_token"),
        eos_id=eos_id,
        pad_id=_token_id(core, stated, settings, "pad_token"),
    )


def _core(path: Path) -> Core:
    try:
        core = Core.from_file(str(path))
        core.encode(_UNHEARD_OF)
    except BaseException as error:  # the Rust library raises bare Exceptions, and its panics none
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(f"{path} is not a tokenizer that works: {error}") from None
    if not core.get_vocab():
        raise ValueError(f"{path} is a tokenizer without tokens.")
    return core


def fit_vocabulary(tokenizer: Tokenizer, vocab_size: int, source: str) -> Tokenizer:
    """The tokenizer of a model whose embedding has `vocab_size` rows.

    Tokens that were added without resizing the embedding stay known, so that a text that holds
    one is refused; a padding token among them is dropped.

    Raises:
      ValueError: the vocabulary itself, the beginning or the end token has no row.
    """
    learned = tokenizer.core.get_vocab(with_added_tokens=False).values()
    added = tokenizer.core.get_added_tokens_decoder()
    if any(token_id >= vocab_size and token_id not in added for token_id in learned):
        raise ValueError(
            f"{source}: the tokenizer yields {tokenizer.vocab_size} tokens, more than the model's "
            f"vocabulary of {vocab_size}; they belong to different models."
        )
    for name in ("bos_id", "eos_id"):
        token_id = getattr(tokenizer, name)
        if token_id is not None and token_id >= vocab_size:
            raise ValueError(
                f"{source}: the tokenizer's {name} is {token_id}, outside the model's vocabulary "
                f"of {vocab_size}: the token was added without resizing the embedding."
            )
    if tokenizer.pad_id is not None and tokenizer.pad_id >= vocab_size:
        tokenizer = dataclasses.replace(tokenizer, pad_id=None)
    if tokenizer.vocab_size > vocab_size:
        tokenizer = dataclasses.replace(tokenizer, num_rows=vocab_size)
    return tokenizer


def _token_id(core: Core, path: Path, settings: Mapping[str, Any], key: str) -> int | None:
    token = settings.get(key)
    text = token.get("content") if isinstance(token, dict) else token
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"{path}: {key} is {token!r}, expected a token's text.")
    return core.token_to_id(text)


def _generation_eos(folder: Path) -> int:
    path = folder / "generation_config.json"
    eos = read_json(path).get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if type(eos) is not int or eos < 0:
        raise ValueError(
            f"{folder} names no end token: neither eos_token in tokenizer_config.json nor "
            f"eos_token_id in {path.name}, which says {eos!r}. Add one of them."
        )
    return eos


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [item for item in template if isinstance(item, dict)]
        default = [item.get("template") for item in named if item.get("name") == "default"]
        template = default[0] if default else None
    if not isinstance(template, str | None):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: chat_template is {template!r}, expected a text."
        )
    return template
