"""Bodies that are refused by name, and bodies that nobody thought of."""

import json
import os

import pytest
from fake_engine import FakeEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import CHAT, GREEDY, refused, service
from starlette.testclient import TestClient

from lora_jax.serving.api.app import app


@pytest.fixture(scope="module")
def shared_client():
    with service(FakeEngine()) as made, TestClient(app(made)) as client:
        yield client


BAD_FIELDS = {
    "n": [0, -1, 1.5, "2", True, 2**31, 10**30, 65],
    "max_tokens": [0, -5, 2**70, 1e3, "9", 508],
    "temperature": [-0.1, 2.1, "hot", True, -(10**400)],
    "top_p": [-0.1, 1.1, [], 10**400],
    "top_k": [-2, 0.5, 2**40],
    "seed": [2**63, -(2**63) - 1, 0.5, "1"],
    "stop": ["", [""], [1], {}, 5, ["a"] * 17, ["x" * 2000]],
    "logprobs": [-1, 21, 1.0, "1", True],
    "stream": [1, "true", []],
    "stream_options": [{}, 3, {"include_usage": True}],
    "ignore_eos": [1, "no"],
    "prompt": ["", [], [[]], [1, "a"], ["a", 1], [1.5], {}, 7, [-1], [10**9], [True], "x" * 512]
    + [["a", ""]],
    "model": ["", 5, [], "green", "\0", "x" * 10_000],
    "echo": [True, 1.5],
    "suffix": ["x"],
    "best_of": [2, 0],
    "frequency_penalty": [0.5, "0", []],
    "presence_penalty": [-2],
    "logit_bias": [{"5": 1}],
    "min_p": [0.1],
    "repetition_penalty": [1.2],
    "stop_token_ids": [[5]],
    "temprature": [0.5, 0, "x", [[]]],
    "": [1],
    "guided_json": [{}],
}


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_bad_values_are_refused_by_name(shared_client, field):
    for value in BAD_FIELDS[field]:
        body = GREEDY | {field: value}
        response = shared_client.post(
            "/v1/completions",
            content=json.dumps(body),
            headers={"content-type": "application/json"},
        )
        error = refused(response, 404 if (field, value) in NOT_FOUND else 400)
        assert error["param"].partition("[")[0] == field, error
        assert len(error["message"]) < 500


NOT_FOUND = [("model", value) for value in ("green", "\0", "x" * 10_000)]

BAD_CHATS = {
    "messages": [None, [], {}, "hi", 3],
    "messages[0]": [["hi"], [None], [[]]],
    "messages[0].role": [[{"content": "x"}], [{"role": "tool", "content": "x"}], [{"role": 1}]],
    "messages[0].content": [[{"role": "user", "content": value}] for value in (None, [], 3, {})]
    + [[{"role": "assistant"}]],
    "messages[0].content[0].type": [[{"role": "user", "content": [{"type": "image_url"}]}]],
    "messages[0].content[0].text": [[{"role": "user", "content": [{"type": "text"}]}]],
    "messages[0].content[0]": [[{"role": "user", "content": ["hi"]}]],
    "messages[0].tool_calls": [[{"role": "assistant", "content": "x", "tool_calls": [{}]}]],
    "messages[0].weight": [[{"role": "user", "content": "x", "weight": 0}]],
}


@pytest.mark.parametrize("param", BAD_CHATS)
def test_bad_messages_are_refused_by_name(shared_client, param):
    for messages in BAD_CHATS[param]:
        body = {"model": "red", "messages": messages}
        refused(shared_client.post("/v1/chat/completions", json=body), 400, param=param)


@pytest.mark.parametrize(
    "field, value",
    {
        "tools": [{}],
        "response_format": {"type": "json_object"},
        "top_logprobs": 2,
        "max_completion_tokens": 9,
        "reasoning_effort": "low",
        "modalities": ["audio"],
        "tool_choice": {"type": "function"},
        "echo": True,
        "prompt": "x",
    }.items(),
)
def test_chat_fields_that_would_change_an_answer(shared_client, field, value):
    body = {"model": "red", "max_tokens": 5} | CHAT | {field: value}
    error = refused(shared_client.post("/v1/chat/completions", json=body), 400)
    assert error["param"] in (field, "max_tokens")


def test_fields_that_change_nothing_are_taken(shared_client):
    harmless = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "top_k": -1,
        "logprobs": None,
        "stop": None,
    }
    chat = {"tools": [], "tool_choice": "none", "modalities": ["text"], "top_logprobs": None}
    chat |= {"model": "red", "temperature": 0, "max_tokens": 4, "max_completion_tokens": 4} | CHAT
    plain = shared_client.post("/v1/completions", json=GREEDY).json()["choices"]
    more = GREEDY | harmless | {"echo": False, "best_of": 1, "suffix": None}
    assert shared_client.post("/v1/completions", json=more).json()["choices"] == plain
    response = shared_client.post("/v1/chat/completions", json=chat | harmless)
    assert response.status_code == 200, response.text


def test_bodies_that_are_no_json(shared_client):
    def post(content, **headers):
        headers = {"content-type": "application/json"} | headers
        return shared_client.post("/v1/completions", content=content, headers=headers)

    for content in (
        b"",
        b"\xff{}",
        b'{"model": "\xc3"}',
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b'{"temperature": NaN}',
        b'{"temperature": -Infinity}',
        b'{"temperature": 1e999}',
        b'{"n": ' + b"9" * 5000 + b"}",
        b'{"model": "\\ud800"}',
        b'{"\\udc00": 1}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b', "model": "red"}',
        b"{} {}",
        "\ufeff{}".encode(),
    ):
        error = refused(post(content), 400)
        assert error["code"] in ("invalid_json", "missing_required_parameter", "invalid_value")
    refused(post(b"{}", **{"content-type": "text/plain"}), 415)
    refused(post(b"{}", **{"content-encoding": "gzip"}), 400)
    refused(shared_client.get("/v1/completions"), 405)
    refused(shared_client.post("/v1/embeddings", json={}), 404, code="unknown_url")
    refused(shared_client.get("/"), 404)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [*BAD_FIELDS, "messages", "tools", "user", "response_format", "top_logprobs", "lora_name"]
) | st.text(max_size=6)
URLS = st.sampled_from(
    ["/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
)
FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ", "150")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(URLS, st.dictionaries(NAMES, VALUES, max_size=4), st.booleans())
def test_any_json_is_answered_or_refused_in_form(shared_client, url, fields, valid_start):
    start = GREEDY if url == "/v1/completions" else {"model": "red", "max_tokens": 3} | CHAT
    body = start | fields if valid_start else fields
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    answered_or_refused(shared_client, url, content)


@FUZZ
@given(URLS, st.binary(max_size=40), st.integers(0, 80))
def test_any_bytes_are_answered_or_refused_in_form(shared_client, url, noise, at):
    start = json.dumps(GREEDY).encode()
    answered_or_refused(shared_client, url, start[:at] + noise + start[at:])


def answered_or_refused(client, url, content):
    headers = {"content-type": "application/json"}
    response = client.post(url, content=content, headers=headers)
    if response.status_code != 200:
        assert response.status_code in (400, 404, 413, 429), response.text
        refused(response, response.status_code)
