import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.data import Tokenizer, byte_tokenizer

TOKENIZER = byte_tokenizer()


@given(st.text().filter(lambda text: "<|" not in text))  # a special token's own name is that token
def test_bytes_are_ids_and_decode_inverts(text):
    ids = TOKENIZER.encode(text)
    assert ids == list(text.encode("utf-8", "surrogatepass"))
    assert TOKENIZER.decode(ids) == text


def test_special_tokens_in_text_are_recognised_and_none_is_added():
    assert TOKENIZER.encode("<|im_start|>a<|im_end|>") == [256, 97, 257]
    assert TOKENIZER.decode([256, 97, 257]) == "<|im_start|>a<|im_end|>"
    assert TOKENIZER.decode([256, 97, 257], skip_special_tokens=True) == "a"


def test_properties():
    assert TOKENIZER.vocab_size == 259
    assert (TOKENIZER.bos_token, TOKENIZER.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert TOKENIZER.core.id_to_token(TOKENIZER.pad_id) == "<|pad|>"
    bare = Tokenizer(core=TOKENIZER.core, chat_template=None, bos_id=None, eos_id=257, pad_id=None)
    assert bare.bos_token is None


def test_offsets_are_in_characters():
    ids, offsets = TOKENIZER.encode_with_offsets("é<|im_end|>x")
    assert ids == [0xC3, 0xA9, 257, 120]
    assert offsets[2:] == [(1, 11), (11, 12)]
    assert {start for start, _ in offsets[:2]} == {0}


def test_is_frozen():
    with pytest.raises(AttributeError):
        TOKENIZER.eos_id = 3  # type: ignore[misc]
