import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.data import PLAIN, Tokenizer, byte_tokenizer, encode, render_messages

TOKENIZER = byte_tokenizer()
USER = {"role": "user", "content": "Hi?"}
ASSISTANT = {"role": "assistant", "content": "Hello."}


def learned(messages, template=None):
    encoded = encode(messages, TOKENIZER, template)
    assert len(encoded.tokens) == len(encoded.loss_mask)
    assert (encoded.tokens.dtype, encoded.loss_mask.dtype) == ("int32", "bool")
    return TOKENIZER.decode(encoded.tokens[encoded.loss_mask].tolist())


def test_the_whole_conversation_is_tokenised_once():
    encoded = encode([USER, ASSISTANT], TOKENIZER)
    text = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    assert encoded.tokens.tolist() == TOKENIZER.encode(text)


def test_loss_on_the_response_and_its_end_of_turn_alone():
    assert learned([USER, ASSISTANT]) == "Hello.<|im_end|>"


def test_every_assistant_turn_counts():
    second = {"role": "assistant", "content": "Two \n"}
    messages = [USER, ASSISTANT, USER, second, USER]
    assert learned(messages) == "Hello.<|im_end|>Two \n<|im_end|>"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=3))
def test_any_text(responses):
    messages = [m for r in responses for m in (USER, {"role": "assistant", "content": r})]
    assert learned(messages) == "".join(f"{response}<|im_end|>" for response in responses)


def test_a_turn_that_ends_in_white_space_keeps_it():
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant: {% endif %}"
    assert learned([USER, ASSISTANT], plain) == "Hello.\n"


def test_no_template():
    bare = Tokenizer(core=TOKENIZER.core, chat_template=None, bos_id=None, eos_id=257, pad_id=None)
    with pytest.raises(ValueError, match="The tokenizer has no chat template: pass one"):
        encode([USER, ASSISTANT], bare)
    assert encode([USER, ASSISTANT], bare, TOKENIZER.chat_template).loss_mask.any()


def test_special_tokens_reach_the_template():
    template = "{{ bos_token }}{% if not add_generation_prompt %}x{{ eos_token }}{% endif %}"
    assert learned([ASSISTANT], template) == "x<|im_end|>"


def test_nothing_to_learn():
    with pytest.raises(ValueError, match="Nothing to learn from this conversation"):
        encode([USER], TOKENIZER)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}",
            r"the end of message 1 differently once the rest follows: '1Hi\?' becomes '2Hi\?2Hello",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<think>{% endif %}",
            "'<think>' becomes 'Hello.' at character 3",
        ),
    ],
)
def test_a_template_that_rewrites_what_came_before(template, message):
    with pytest.raises(ValueError, match=message):
        encode([USER, ASSISTANT], TOKENIZER, template)


def test_the_plain_template_is_prompt_new_line_response_end():
    system = {"role": "system", "content": "Be brief."}
    encoded = encode([system, USER, ASSISTANT], TOKENIZER, PLAIN)
    assert TOKENIZER.decode(encoded.tokens.tolist()) == "Hi?\nHello.<|im_end|>"
    assert learned([system, USER, ASSISTANT], PLAIN) == "Hello.<|im_end|>"
    prompt = render_messages([system, USER], TOKENIZER, PLAIN, add_generation_prompt=True)
    assert prompt == "Hi?\n"
