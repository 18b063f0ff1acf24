"""A tokenizer as a value: the `tokenizers` core with what a model's files say beside it."""

from dataclasses import dataclass

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

Offsets = list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A `tokenizers` core, the model's chat template and its special tokens.

    Encoding adds no special tokens, since a chat template writes them out, and recognises those
    that stand in the text.
    """

    core: tokenizers.Tokenizer
    chat_template: str | None
    bos_id: int | None
    eos_id: int
    pad_id: int | None

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that encoding may yield."""
        return max(self.core.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def bos_token(self) -> str | None:
        return None if self.bos_id is None else self.core.id_to_token(self.bos_id)

    @property
    def eos_token(self) -> str | None:
        return self.core.id_to_token(self.eos_id)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        return self.core.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """The ids of `text`, and for each the half-open range of characters it stands for."""
        encoding = self.core.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `ids`, special tokens spelled out unless they are skipped."""
        return self.core.decode(ids, skip_special_tokens=skip_special_tokens)


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
    """What byte-level BPE writes for each byte: the character if visible, else a stand-in."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(stand_ins)) for byte in range(256)]
