"""A hand-made SentencePiece vocabulary of 289 tokens, as GGUF spells it, and its ids of texts.

The scores are not in the order of the ids. `GOLDEN` is what LlamaConverter's recipe in transformers
gives (a live test holds it), and what llama.cpp does: a space in front of the text, and of what
follows a special token.
"""

from typing import Any

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# By rising rank; the letters, which nothing makes, come last.
JOINED = ["▁t", "he", "▁the", "in", "▁a", "er", "an", "▁in", "and", "▁an", "▁and", "▁▁", "th"]
LETTERS = ["▁", "t", "h", "e", "i", "n", "a", "r", "d", "é", "语", "s", ">", "<"]
RANKED = [*JOINED, *LETTERS]
PIECES = [*reversed(JOINED), *LETTERS]
ADDED = ["[INST]", "<pad>"]
TOKENS = ["<unk>", "<s>", "</s>", *BYTES, *PIECES, "[INST]", "<tool>", "<pad>"]
KINDS = [2, 3, 3] + [6] * 256 + [1] * len(PIECES) + [3, 4, 3]
SCORES = [0.0] * 259 + [-float(RANKED.index(piece)) for piece in PIECES] + [-1000.0] * 3

TEXTS = [
    "", " ", "the", " the", "  the   and", "the and\nin", "thethe and", "é 语 – 🙂", "x\t<0x41>",
    "<s>the</s> the</s>the", "[INST] and the[INST]", "a<tool>the <tool>", "e\u0301", "▁the", "<s>",
    "\u00a0an", "the<unk>and", "<pad>", "ththth anander",
]  # fmt: skip

GOLDEN = [
    [], [260], [269], [272, 269], [260, 269, 260, 261], [269, 261, 13, 268], [269, 273, 270, 261],
    [272, 281, 272, 282, 272, 229, 131, 150, 272, 243, 162, 156, 133],
    [272, 123, 12, 285, 51, 123, 55, 52, 284], [1, 269, 2, 272, 269, 2, 269],
    [286, 272, 261, 269, 286], [267, 287, 269, 272, 287], [272, 275, 207, 132], [272, 269], [1],
    [272, 197, 163, 265], [269, 0, 261], [288], [271, 274, 259, 259, 262, 263, 266],
]  # fmt: skip


def entries(**changes: Any) -> dict[str, Any]:
    """The `tokenizer.ggml.*` metadata of a GGUF."""
    values = {
        "model": "llama",
        "pre": "default",
        "tokens": TOKENS,
        "scores": SCORES,
        "token_type": KINDS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": len(TOKENS) - 1,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (values | changes).items()}
