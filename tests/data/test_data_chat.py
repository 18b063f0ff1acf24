import datetime

import pytest

from lora_jax.data import render
from lora_jax.data.tokenizer import CHATML

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": " Hi <b> & “you” "}
ASSISTANT = {"role": "assistant", "content": "Hello.\n"}
CHAT = [SYSTEM, USER, ASSISTANT]

# As the model's GGUF holds it.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = """\
{{- bos_token }}
{%- set offset = 1 if messages[0]['role'] == 'system' else 0 %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == offset) and loop.index0 >= offset %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
EXTENSIONS = """\
{% set ns = namespace(seen=0) %}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% set ns.seen = ns.seen + 1 %}
    {% if message.role == 'assistant' %}
A{{ loop.index }}/{{ loop.length }}: {% generation %}
{{ message.content[:5] }}{{ eos_token }}{% endgeneration %}

    {% else %}
U: {{ message | tojson }} {{ message | tojson(indent=1) }}
    {% endif %}
    {% if ns.seen == 2 %}
        {% break %}
    {% endif %}
{% endfor %}
{{ tools is none }} {{ "%03d" % ns.seen }} {{ missing is defined }}
"""
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

# Recorded from transformers 5.23.0, AutoTokenizer.apply_chat_template(tokenize=False).
GOLDEN = [
    (
        SMOLLM2,
        [USER],
        True,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\n Hi <b> & “you” <|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        SMOLLM2,
        CHAT,
        False,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi <b> & “you” <|im_end|>\n"
        "<|im_start|>assistant\nHello.\n<|im_end|>\n",
    ),
    (
        HEADERS,
        CHAT,
        True,
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi <b> & “you”<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    (
        EXTENSIONS,
        [*CHAT, USER],
        False,
        'U: {"role": "user", "content": " Hi <b> & “you” "} '
        '{\n "role": "user",\n "content": " Hi <b> & “you” "\n}\n'
        "A3/4: Hello</s>\nTrue 002 False",
    ),
]


@pytest.mark.parametrize(("template", "messages", "prompt", "expected"), GOLDEN)
def test_golden(template, messages, prompt, expected):
    assert render(template, messages, add_generation_prompt=prompt, **SPECIAL) == expected


@pytest.mark.parametrize("template", [SMOLLM2, HEADERS, EXTENSIONS, CHATML])
@pytest.mark.parametrize("messages", [CHAT, CHAT[:2], CHAT[1:], [*CHAT, USER, ASSISTANT]])
@pytest.mark.parametrize("prompt", [False, True])
def test_agrees_with_transformers(template, messages, prompt):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from lora_jax.data import byte_tokenizer

    peer = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().core, **SPECIAL)
    expected = peer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
    )
    assert render(template, messages, add_generation_prompt=prompt, **SPECIAL) == expected


def test_none_counts_as_absent_and_the_date_is_today():
    message = {"role": "user", "content": "x", "name": None}
    assert render("{{ 'name' in messages[0] }}", [message]) == "False"
    assert render("{{ strftime_now('%Y') }}", []) == str(datetime.datetime.now().year)


def test_the_templates_own_message():
    with pytest.raises(ValueError, match=r"chat template failed: roles must alternate"):
        render(HEADERS, [ASSISTANT, USER], **SPECIAL)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\n{% for %}", "not valid Jinja, line 2: Expected an expression"),
        ("{{ nothing.at_all }}", "'nothing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% include 'x' %}", "no loader"),
        ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
        ("{{ cycler.__init__.__globals__.os }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurse without end"),
        ("{{ lipsum(n=1000000) }}", "'lipsum' is undefined"),
    ],
)
def test_bad_templates(template, message):
    with pytest.raises(ValueError, match=message):
        render(template, CHAT)


GROW = "{% set n = namespace(x=START) %}{% for i in range(99) %}{% set n.x = STEP %}{% endfor %}"


def grow(start, step, end="{{ n.x }}"):
    return GROW.replace("START", start).replace("STEP", step) + end


@pytest.mark.parametrize(
    "template",
    [
        grow("'ab'", "n.x + n.x"),
        grow("'ab'", "n.x ~ n.x"),
        grow("'ab'", "(n.x ~ n.x) | upper"),
        grow("3", "n.x * n.x"),
        grow("[1]", "n.x + n.x"),
        grow("[1]", "[n.x, n.x]", "{{ n.x | tojson | length }}"),
        "{{ 'x' * 10**11 }}",
        "{{ 'x' * 1000000 * 1000000 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'x'.ljust(10**11) }}",
        "{{ 'x' | center(10**11) }}",
        "{{ '%099999999999d' % 1 }}",
        "{{ '%099999999999d' | format(1) }}",
        "{{ '{:099999999999d}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=999999999) }}",
        "{{ ('a' * 1000000).replace('a', 'a' * 1000000) }}",
        "{{ 'a' * 1000000 | replace('a', 'a' * 1000000) }}",
        "{{ range(100000) | join('a' * 1000000) }}",
        "{{ ('\n' * 1000000) | indent(1000000) }}",
        "{{ ('\t' * 1000000).expandtabs(1000000) }}",
        "{{ range(100000) | list | tojson(indent=1000000) }}",
    ],
)
def test_memory_is_bounded(template):
    with pytest.raises(ValueError, match=r"more than 2,000,000 characters|absurd width"):
        render(template, CHAT)


LONG = "{% set x = 'x' * 1900000 %}{% for i in range(100000) %}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}",
        "{% for i in range(100000) %}{% set y = range(100000) | sum %}{% endfor %}",
        LONG + "{{ x }}{% endfor %}",
        LONG + "{% set y = x + 'a' %}{% endfor %}",
        LONG + "{% set y = x | upper %}{% endfor %}",
        LONG + "{% set y = x[1:] %}{% endfor %}",
        LONG + "{% if 'y' in x %}{% endif %}{% endfor %}",
        LONG + "{% if x == x ~ '' %}{% endif %}{% endfor %}",
    ],
)
def test_work_is_bounded(template):
    with pytest.raises(ValueError, match="more work than a conversation can need"):
        render(template, CHAT)


def test_a_very_long_chat_passes():
    messages = [{"role": "user", "content": "word " * 100}, {**ASSISTANT}] * 400
    text = render(SMOLLM2, messages)
    assert text.count("<|im_end|>") == 801
