"""SentencePiece tokenizers (Llama 2's, Mistral's) in the metadata of GGUF files.

SentencePiece repeatedly joins the two neighbours whose union is the piece of the highest score. A
BPE model whose merges are ordered by the scores of their results does the same. (Of pieces with one
score, SentencePiece takes the leftmost pair, and this the piece of the lower id.)

A space is added in front of a text, and after a special token, as in llama.cpp and in the
tokenizer.json that Meta and Mistral published. GGUF cannot express other rules, such as those of
transformers 5 for tokenizers without `legacy`; then the full tokenizer.json is written into it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Core

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
HUGGINGFACE_JSON = "tokenizer.huggingface.json"
_SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_DEFAULTS = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "unknown_token_id": 0,
    "add_bos_token": True,
    "add_eos_token": False,
    "add_space_prefix": True,
}
Merges = list[tuple[str, str]]


def with_defaults(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries with llama.cpp's defaults where the metadata leaves a key out."""
    return {**_DEFAULTS, **entries}


def sentencepiece_core(path: Path, entries: Mapping[str, Any], stated: str | None) -> Core:
    """The tokenizer of the entries, or of the full tokenizer.json `stated`, which must agree.

    Raises:
      ValueError: the entries contradict themselves, or tokenizer.json.
    """
    tokens, kinds, scores = entries["tokens"], entries["token_type"], entries["scores"]
    if len(scores) != len(tokens):
        raise ValueError(f"{path} is corrupt: {len(tokens)} tokens but {len(scores)} scores.")
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError(f"{path} is corrupt: {len(tokens) - len(vocab)} tokens appear twice.")
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == BYTE and not _BYTE.fullmatch(token):
            raise ValueError(f"{path} is corrupt: {token!r} is no byte, such as '<0x0A>'.")
    if stated is not None:
        return _checked(path, stated, vocab)
    core = Core(
        models.BPE(
            vocab=vocab,
            merges=merges_of(tokens, kinds, scores),
            unk_token=tokens[entries["unknown_token_id"]],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    has_prefix = bool(entries["add_space_prefix"])
    core.normalizer = _normalizer(has_prefix)
    strip = [decoders.Strip(content=" ", left=1)] if has_prefix else []
    core.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for kind in (UNKNOWN, CONTROL, USER_DEFINED):
        core.add_tokens(
            [
                AddedToken(token, special=kind != USER_DEFINED, normalized=False)
                for token, its_kind in zip(tokens, kinds, strict=True)
                if its_kind == kind
            ]
        )
    return core


def merges_of(tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float]) -> Merges:
    """Every way to make a normal piece of two, by falling score."""
    normal = {t: i for i, (t, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == NORMAL}
    merges = []
    for token in sorted(normal, key=lambda token: (-scores[normal[token]], normal[token])):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal:
                merges.append((left, right))
    return merges


def is_sentencepiece(core: Mapping[str, Any]) -> bool:
    """Whether tokenizer.json, parsed, is of the family that this file writes."""
    spaces = json.dumps([core["normalizer"], core["pre_tokenizer"]], ensure_ascii=False)
    return core["model"]["type"] == "BPE" and (
        bool(core["model"].get("byte_fallback")) or _SPACE in spaces
    )


def sentencepiece_entries(core: Core, vocab_size: int) -> tuple[dict[str, Any], str | None]:
    """The entries `tokenizer.ggml.*` that name the tokens, and, where they do not suffice, the
    full tokenizer.json.

    Raises:
      ValueError: SentencePiece would not join the tokens as this tokenizer does.
    """
    parsed = json.loads(core.to_str())
    model = parsed["model"]
    has_prefix, is_exact = _prefix(parsed)
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for token, token_id in core.get_vocab(with_added_tokens=True).items():
        if token_id < vocab_size:
            tokens[token_id] = token
            kinds[token_id] = BYTE if _BYTE.fullmatch(token) else NORMAL
    added = {i: token for i, token in core.get_added_tokens_decoder().items() if i < vocab_size}
    for token_id, one in added.items():
        kinds[token_id] = CONTROL if one.special else USER_DEFINED
        is_exact &= not (one.lstrip or one.rstrip or one.single_word or one.normalized)
    unknown = core.token_to_id(model["unk_token"] or "<unk>")
    has_all_bytes = kinds.count(BYTE) == 256
    if unknown is not None:
        kinds[unknown] = UNKNOWN
    elif not has_all_bytes:
        raise _unsayable("it has neither an unknown token nor all 256 byte tokens")
    is_exact &= has_all_bytes or model["unk_token"] is not None
    if BYTE in kinds and not model["byte_fallback"]:
        raise _unsayable("it does not fall back to its byte tokens")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(key):
            raise _unsayable(f"its {key} is {model[key]!r}")
    entries = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": _scores(model["merges"], tokens, kinds),
        "token_type": kinds,
        "unknown_token_id": unknown,
        "add_space_prefix": has_prefix,
    }
    return entries, None if is_exact else core.to_str()


def _checked(path: Path, text: str, vocab: Mapping[str, int]) -> Core:
    try:
        core = Core.from_str(text)
        core.encode("a \ue000")
    except BaseException as error:  # the Rust library raises bare Exceptions, and its panics none
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(f"{path} is corrupt: its {HUGGINGFACE_JSON} fails: {error}") from None
    stated = core.get_vocab(with_added_tokens=True)
    wrong = [token for token, i in stated.items() if i < len(vocab) and vocab.get(token) != i]
    if wrong:
        raise ValueError(
            f"{path} contradicts itself: its {HUGGINGFACE_JSON} gives {wrong[0]!r} another id than "
            "tokenizer.ggml.tokens."
        )
    return core


def _normalizer(has_prefix: bool) -> normalizers.Normalizer:
    replace = normalizers.Replace(" ", _SPACE)
    return normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if has_prefix else replace


def _prefix(parsed: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a space is put in front, and whether it is where SentencePiece puts it."""
    found = _steps(parsed["normalizer"]), _steps(parsed["pre_tokenizer"])
    for has_prefix in (True, False):
        if found == (_built(normalizer=_normalizer(has_prefix)), []):
            return has_prefix, True
    for scheme in ("always", "first", "never"):
        metaspace = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme, split=False)
        if found == ([], _built(pre_tokenizer=metaspace)):
            return scheme != "never", scheme == "never"
    raise _unsayable(
        f"its normalizer {parsed['normalizer']!r} and pre-tokenizer {parsed['pre_tokenizer']!r} "
        "are not Llama's"
    )


def _built(**part: Any) -> list[Any]:
    core = Core(models.BPE())
    for name, value in part.items():
        setattr(core, name, value)
    parsed = json.loads(core.to_str())
    return _steps(parsed["normalizer"] or parsed["pre_tokenizer"])


def _steps(part: Any) -> list[Any]:
    if part is None:
        return []
    inner = part.get("normalizers", part.get("pretokenizers"))
    return [part] if inner is None else [step for one in inner for step in _steps(one)]


def _scores(stated: Sequence[Any], tokens: list[str], kinds: list[int]) -> list[float]:
    """Scores by which SentencePiece joins what the merges join."""
    normal = {token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    pairs = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in stated
    ]
    # The other merges read or write a token that is matched in the text before any merge.
    merges = [pair for pair in pairs if {*pair, "".join(pair)} <= normal]
    order = list(dict.fromkeys("".join(pair) for pair in merges))
    joined = set(order)
    order += [token for token in tokens if token in normal and token not in joined]
    ranks = {token: -float(rank) for rank, token in enumerate(order)}
    others = {USER_DEFINED: -1000.0, UNUSED: -10_000.0}
    scores = [
        ranks[token] if kind == NORMAL else others.get(kind, 0.0)
        for token, kind in zip(tokens, kinds, strict=True)
    ]
    derived = merges_of(tokens, kinds, scores)
    if set(derived) != set(merges):
        lacking = sorted(set(derived) ^ set(merges))[0]
        raise _unsayable(f"SentencePiece would join {lacking} and it would not, or the reverse")
    if ["".join(pair) for pair in derived] != ["".join(pair) for pair in merges]:
        raise _unsayable("its merges of one piece do not follow one another")
    return scores


def _unsayable(reason: str) -> ValueError:
    return ValueError(
        f"GGUF has SentencePiece tokenizers, and this one cannot be written as one: {reason}. "
        "Export a Hugging Face folder instead."
    )
