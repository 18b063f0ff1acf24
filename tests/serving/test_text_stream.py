"""Text comes as soon as it is certain, and no sooner."""

from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data.tokenizer import byte_tokenizer
from lora_jax.serving.text_stream import TextStream

TOKENIZER = byte_tokenizer()


def stream(tokens, stops=()):
    """The texts of each push and of the end, as far as a stop string."""
    text, texts = TextStream(TOKENIZER, stops), []
    for token in tokens:
        texts.append(text.push(token))
        if text.stopped:
            break
    return [*texts, text.flush()], text.stopped


@settings(deadline=None)
@given(st.lists(st.integers(0, 258), max_size=40))
def test_pieces_are_the_whole(tokens):
    texts, _ = stream(tokens)
    assert "".join(texts) == TOKENIZER.decode(tokens, skip_special_tokens=True)


@settings(deadline=None)
@given(st.text(max_size=20))
def test_no_piece_holds_half_a_character(text):
    texts, _ = stream(text.encode())
    assert "".join(texts) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in texts)
        assert all(len(piece) <= 1 for piece in texts[:-1])


@settings(deadline=None)
@given(st.text("aбb", max_size=12), st.lists(st.text("aбb", min_size=1, max_size=4), max_size=3))
def test_what_follows_a_stop_string_is_never_said(text, stops):
    texts, stopped = stream(text.encode(), stops)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert stopped == bool(ends)
    assert "".join(texts) == (text[: min(ends)[1]] if ends else text)
    said = ""
    for piece in texts[:-1]:  # no text is taken back, and none is held without need
        said += piece
        assert not any(stop in said for stop in stops)
