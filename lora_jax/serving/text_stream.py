"""Text out of tokens, as soon as it is certain."""

from collections.abc import Sequence

from lora_jax.data.tokenizer import Tokenizer

_NO_CHARACTER = "\ufffd"


class TextStream:
    """The text of an answer while its tokens come.

    What may be the beginning of a stop string, or half a character, is held back. The texts that
    `push` and `flush` return are together `tokenizer.decode` of all tokens, without special ones,
    up to where the first stop string that is complete begins.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._tokens: list[int] = []  # of a window whose text before `_decoded` is known
        self._decoded = 0
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """New text that is certain. `stopped` says whether a stop string is complete."""
        self._tokens.append(token)
        return self._text(self._decode(final=False), final=False)

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        return "" if self.stopped else self._text(self._decode(final=True), final=True)

    def _decode(self, *, final: bool) -> str:
        """The text of tokens behind the first `_decoded` of the window; empty while it is open.

        A token is decoded behind those before it, since some tokenizers drop a leading space.
        """
        before = self._plain(self._tokens[: self._decoded])
        text = self._plain(self._tokens)
        if not final and text.endswith(_NO_CHARACTER):
            return ""
        if len(text) > len(before):  # a window of special tokens alone tells nothing of spaces
            self._tokens = self._tokens[self._decoded :]
        self._decoded = len(self._tokens)
        return text[len(before) :]

    def _plain(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _text(self, new: str, *, final: bool) -> str:
        text = self._held + new
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many last characters of `text` are the first ones of `stop`."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
