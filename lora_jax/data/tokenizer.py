"""A tokenizer as a value: the `tokenizers` core, a chat template and special tokens."""

from dataclasses import dataclass

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ message['content'] + '\\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)

Offsets = list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A `tokenizers` core, the model's chat template and its special tokens.

    Encoding adds no special tokens, since a chat template writes them, and recognises those in
    the text. `num_rows`, where given, is the size of an embedding that lacks rows for
    some added tokens: a text that holds one of these is an error.
    """

    core: tokenizers.Tokenizer
    chat_template: str | None
    bos_id: int | None
    eos_id: int
    pad_id: int | None
    num_rows: int | None = None

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that encoding may yield."""
        size = max(self.core.get_vocab(with_added_tokens=True).values()) + 1
        return size if self.num_rows is None else min(size, self.num_rows)

    @property
    def bos_token(self) -> str | None:
        return None if self.bos_id is None else self.core.id_to_token(self.bos_id)

    @property
    def eos_token(self) -> str | None:
        return self.core.id_to_token(self.eos_id)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        return self._checked(self.core.encode(text, add_special_tokens=False)).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """The ids of `text`, and for each the half-open range of characters it stands for."""
        encoding = self._checked(self.core.encode(text, add_special_tokens=False))
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `ids`, special tokens spelled out unless they are skipped."""
        return self.core.decode(ids, skip_special_tokens=skip_special_tokens)

    def _checked(self, encoding: tokenizers.Encoding) -> tokenizers.Encoding:
        if self.num_rows is not None:
            for token_id, token in zip(encoding.ids, encoding.tokens, strict=True):
                if token_id >= self.num_rows:
                    raise ValueError(
                        f"the text holds the token {token!r}, id {token_id}, and the model's "
                        f"embedding has {self.num_rows} rows: the token was added without resizing "
                        "it. Leave the token out of the text and of the chat template."
                    )
        return encoding


def byte_tokenizer() -> Tokenizer:
    """A tokenizer for small models and tests: id `b` is byte `b`, 256 to 258 are special tokens.

    Its chat template is plain ChatML.
    """
    core = tokenizers.Tokenizer(
        models.BPE(vocab={char: byte for byte, char in enumerate(_byte_alphabet())}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|pad|>"])
    return Tokenizer(core=core, chat_template=CHATML, bos_id=256, eos_id=257, pad_id=258)


def _byte_alphabet() -> list[str]:
    """The character of byte-level BPE for each byte: itself if visible, else another."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(stand_ins)) for byte in range(256)]
