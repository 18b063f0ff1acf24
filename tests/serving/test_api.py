"""OpenAI's forms over an engine, through the ASGI app."""

import dataclasses
import json
import os

import fake_engine
import pytest
from fake_engine import TOKENIZER, FakeEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import BASE, MODEL, adapter_folder, service
from starlette.testclient import TestClient

from lora_jax.serving.api import app
from lora_jax.serving.limits import Limits
from lora_jax.serving.request import Request, Sampling

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
GREEDY = {"model": "red", "prompt": "hello", "temperature": 0, "max_tokens": 24}


@pytest.fixture
def client():
    with service(FakeEngine()) as made, TestClient(app(made)) as client:
        client.service = made
        yield client


@pytest.fixture(scope="module")
def shared_client():
    with service(FakeEngine()) as made, TestClient(app(made)) as client:
        yield client


def expected(prompt, *, adapter="red", limit=24, seed=0, temperature=0.0, stop=()):
    """What the engine answers: text, finish, number of tokens."""
    if isinstance(prompt, str):
        prompt = TOKENIZER.encode(prompt)
    request = Request(
        tokens=tuple(prompt),
        adapter=adapter,
        max_new_tokens=limit,
        sampling=Sampling(temperature=temperature, seed=seed),
        stop=stop,
    )
    tokens = fake_engine.answer(request, adapter)
    finish = "stop" if tokens[-1] == TOKENIZER.eos_id else "length"
    text = TOKENIZER.decode(tokens, skip_special_tokens=True)
    for one in stop:
        if one in text:
            text, finish = text.partition(one)[0], "stop"
    return text, finish, len(tokens)


def sent_events(response):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, last = [line for line in response.text.split("\n\n") if line]
    assert last == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def refused(response, status, *, param=None, code=None):
    """The error of an answer that is one."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    error = body["error"]
    assert isinstance(error["message"], str) and error["message"]
    assert error["type"] in ("invalid_request_error", "rate_limit_error", "server_error")
    assert (param, code) == (param and error["param"], code and error["code"]), error
    return error


# Answers.


@pytest.mark.parametrize("name", [BASE, "red", "blue"])
def test_a_completion(client, name):
    answer = client.post("/v1/completions", json=GREEDY | {"model": name}).json()
    text, finish, tokens = expected("hello", adapter=None if name == BASE else name)
    assert answer["choices"] == [
        {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    ]
    assert answer["object"] == "text_completion" and answer["model"] == name
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": tokens,
        "total_tokens": 5 + tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_a_chat_is_the_templates_text(client):
    body = {"model": "red", "temperature": 0, "max_completion_tokens": 24} | CHAT
    answer = client.post("/v1/chat/completions", json=body).json()
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    text, finish, _ = expected(prompt)
    message = {"role": "assistant", "content": text, "refusal": None}
    assert answer["choices"] == [
        {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    ]
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    body["messages"] = [{"role": "user", "content": parts, "name": None}]
    again = client.post("/v1/chat/completions", json=body).json()
    assert again["choices"] == answer["choices"]


def test_a_chat_goes_on_to_the_end_of_the_context_unless_told(client):
    answer = client.post("/v1/chat/completions", json={"model": "red", "temperature": 0} | CHAT)
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    limit = fake_engine.CONTEXT - len(TOKENIZER.encode(prompt))
    assert answer.json()["choices"][0]["message"]["content"] == expected(prompt, limit=limit)[0]


def test_prompts_are_texts_or_tokens_or_lists_of_them(client):
    tokens = TOKENIZER.encode("hello")
    one = client.post("/v1/completions", json=GREEDY).json()["choices"][0]["text"]
    other = client.post("/v1/completions", json=GREEDY | {"prompt": "bye"}).json()
    other = other["choices"][0]["text"]
    for prompt, texts in {
        "tokens": (tokens, [one]),
        "texts": (["hello", "bye", "hello"], [one, other, one]),
        "lists": ([tokens, TOKENIZER.encode("bye")], [one, other]),
        "mixed": ([tokens, "bye"], [one, other]),
    }.values():
        answer = client.post("/v1/completions", json=GREEDY | {"prompt": prompt}).json()
        assert [choice["text"] for choice in answer["choices"]] == texts
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("usage", [False, True])
def test_streams_say_what_whole_answers_say(client, is_chat, usage):
    url = "/v1/chat/completions" if is_chat else "/v1/completions"
    asked = CHAT | {"logprobs": True, "top_logprobs": 2} if is_chat else {"prompt": ["hello", "b"]}
    asked |= {"model": "blue", "n": 2, "seed": 7, "max_tokens": 40, "stop": ["q", "zz"]}
    whole = client.post(url, json=asked).json()
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = sent_events(client.post(url, json=asked | {"stream": True} | options))
    if usage:
        *chunks, last = chunks
        assert last["choices"] == [] and last["usage"] == whole["usage"]
        assert all(chunk["usage"] is None for chunk in chunks)
    texts, finishes, logprobs = {}, {}, {}
    for chunk in chunks:
        assert chunk["id"] == chunks[0]["id"] and ("usage" in chunk) == usage
        (choice,) = chunk["choices"]
        index = choice["index"]
        assert index not in finishes, "nothing follows the end"
        text = choice["delta"].get("content", "") if is_chat else choice["text"]
        texts[index] = texts.get(index, "") + text
        if choice["finish_reason"]:
            finishes[index] = choice["finish_reason"]
        if choice["logprobs"]:
            logprobs.setdefault(index, []).extend(choice["logprobs"]["content"])
    for choice in whole["choices"]:
        index = choice["index"]
        text = choice["message"]["content"] if is_chat else choice["text"]
        assert texts[index] == text and finishes[index] == choice["finish_reason"]
        if is_chat:
            assert logprobs[index] == choice["logprobs"]["content"]
    assert len(whole["choices"]) == len(texts)


def test_seeds_choose_samples(client):
    asked = GREEDY | {"temperature": 1, "n": 3}

    def texts(**more):
        choices = client.post("/v1/completions", json=asked | more).json()["choices"]
        return [choice["text"] for choice in choices]

    assert texts(seed=1) == texts(seed=1) and len(set(texts(seed=1))) == 3
    assert texts(seed=1)[0] == expected("hello", seed=1, temperature=1.0)[0]
    assert not set(texts(seed=1)) & set(texts(seed=2))
    assert not set(texts()) & set(texts())
    assert texts(seed=-(2**63)) != texts(seed=2**63 - 1)


def test_stop_ends_an_answer(client):
    text = expected("hello")[0]
    for stop in (text[5:8], [text[5:8]], ["never there", text[5:8]]):
        answer = client.post("/v1/completions", json=GREEDY | {"stop": stop}).json()
        assert answer["choices"][0]["text"] == text[:5]
        assert answer["choices"][0]["finish_reason"] == "stop"


def test_logprobs_of_completions_and_chats(client):
    answer = client.post("/v1/completions", json=GREEDY | {"logprobs": 3}).json()
    choice = answer["choices"][0]
    logprobs = choice["logprobs"]
    shown = [token for token in logprobs["tokens"] if token != "<|im_end|>"]
    assert "".join(shown) == choice["text"]
    assert len(logprobs["tokens"]) == answer["usage"]["completion_tokens"]
    assert set(logprobs["token_logprobs"]) == {-0.5} and logprobs["text_offset"][:3] == [0, 1, 2]
    assert logprobs["top_logprobs"][0][logprobs["tokens"][0]] == -0.5
    assert -9999.0 in logprobs["top_logprobs"][0].values()  # JSON has no infinity
    none = client.post("/v1/completions", json=GREEDY | {"logprobs": 0}).json()
    assert none["choices"][0]["logprobs"]["tokens"] == logprobs["tokens"]
    body = {"model": "red", "temperature": 0, "max_tokens": 5, "logprobs": True} | CHAT
    content = client.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]
    entry = content["content"][0]
    assert entry["bytes"] == list(entry["token"].encode()) and entry["top_logprobs"] == []
    body["top_logprobs"] = 3
    content = client.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]
    third = content["content"][0]["top_logprobs"][2]
    assert third == {"token": "\ufffd", "bytes": None, "logprob": -9999.0}


def test_models(client):
    listed = client.get("/v1/models").json()
    assert [card["id"] for card in listed["data"]] == [BASE, "red", "blue"]
    assert [card["parent"] for card in listed["data"]] == [None, BASE, BASE]
    assert client.get("/v1/models/red").json() == listed["data"][1]
    refused(client.get("/v1/models/green"), 404, param="model", code="model_not_found")


def test_metrics_and_health(client):
    client.post("/v1/completions", json=GREEDY)
    client.post("/v1/completions", json=GREEDY | {"n": 0})
    client.get("/nowhere/1")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    assert 'lora_jax_http_requests_total{route="completions",status="200"} 1.0' in lines
    assert 'lora_jax_http_requests_total{route="completions",status="400"} 1.0' in lines
    assert 'lora_jax_http_requests_total{route="none",status="404"} 1.0' in lines
    assert f"lora_jax_generated_tokens_total {float(expected('hello')[2])}" in lines
    assert "lora_jax_prompt_tokens_total 5.0" in lines and "lora_jax_engine_adapters 2.0" in lines
    assert any(line.startswith("lora_jax_engine_steps_total ") for line in lines)
    assert "lora_jax_time_to_first_token_seconds_count 1.0" in lines
    assert client.get("/health").json() == {"status": "ok"}


# Adapters that come and go.


def test_adapters_come_and_go(client, tmp_path):
    folder = adapter_folder(tmp_path, "green")
    asked = GREEDY | {"model": "green"}
    refused(client.post("/v1/completions", json=asked), 404, param="model", code="model_not_found")
    load = {"lora_name": "green", "lora_path": str(folder)}
    response = client.post("/v1/load_lora_adapter", json=load)
    assert response.text == "Success: LoRA adapter 'green' added successfully."
    answer = client.post("/v1/completions", json=asked).json()
    assert answer["choices"][0]["text"] == expected("hello", adapter="green")[0]
    again = client.post("/v1/load_lora_adapter", json=load)
    refused(again, 400, param="lora_name", code="adapter_exists")
    response = client.post("/v1/unload_lora_adapter", json={"lora_name": "green"})
    assert response.text == "Success: LoRA adapter 'green' removed successfully."
    refused(client.post("/v1/completions", json=asked), 404, code="model_not_found")
    assert client.post("/v1/load_lora_adapter", json=load).status_code == 200


def test_adapters_that_cannot_be_loaded_say_why(client, tmp_path):
    def load(name, path):
        body = {"lora_name": name, "lora_path": str(path)}
        return client.post("/v1/load_lora_adapter", json=body)

    good = adapter_folder(tmp_path, "good")
    refused(load("x", tmp_path / "none"), 404, param="lora_path", code="adapter_not_found")
    refused(load(BASE, good), 400, param="lora_name")
    refused(load("a\nb", good), 400, param="lora_name")
    refused(load("a", "\0"), 400, param="lora_path")
    refused(load("a", "/" + "x" * 5000), 404, param="lora_path")
    wrong = adapter_folder(tmp_path, "wrong", peft_type="OFT")
    error = refused(load("x", wrong), 400, param="lora_path", code="adapter_not_served")
    assert "OFT" in error["message"]
    (wrong / "adapter_config.json").write_text("{")
    refused(load("x", wrong), 400, param="lora_path")
    unload = client.post("/v1/unload_lora_adapter", json={"lora_name": "x"})
    refused(unload, 404, param="lora_name", code="adapter_not_found")
    refused(client.post("/v1/unload_lora_adapter", json={"lora_name": 3}), 400, param="lora_name")
    assert [known.name for known in client.service.catalog] == ["red", "blue"]


# What is refused.

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


def test_bodies_over_the_limit():
    with service(FakeEngine(), limits=Limits(body_bytes=1000)) as made:
        client = TestClient(app(made))
        large = json.dumps(GREEDY | {"prompt": "x" * 1000}).encode()
        headers = {"content-type": "application/json"}
        for content in (large, iter([large[:500], large[500:]])):  # declared, and in chunks
            response = client.post("/v1/completions", content=content, headers=headers)
            refused(response, 413, code="body_too_large")
        assert client.post("/v1/completions", json=GREEDY).status_code == 200


def test_limits_on_tokens_and_choices():
    with service(FakeEngine(), limits=Limits(max_tokens=10, choices=4)) as made:
        client = TestClient(app(made))
        assert client.post("/v1/completions", json=GREEDY | {"max_tokens": 10}).status_code == 200
        long = client.post("/v1/completions", json=GREEDY | {"max_tokens": 11})
        refused(long, 400, param="max_tokens")
        body = {"model": "red", "max_completion_tokens": 11} | CHAT
        chat = client.post("/v1/chat/completions", json=body)
        refused(chat, 400, param="max_completion_tokens")
        unsaid = client.post("/v1/chat/completions", json={"model": "red"} | CHAT).json()
        assert unsaid["usage"]["completion_tokens"] <= 10
        refused(client.post("/v1/completions", json=GREEDY | {"n": 5}), 400, param="n")
        many = GREEDY | {"prompt": ["a"] * 5}
        refused(client.post("/v1/completions", json=many), 400, param="prompt")


def test_a_full_queue_takes_all_of_a_request_or_none():
    engine = FakeEngine(max_waiting=3)
    with service(engine) as made:
        client = TestClient(app(made))
        response = client.post("/v1/completions", json=GREEDY | {"n": 4})
        error = refused(response, 429, code="queue_full")
        assert response.headers["retry-after"] == "1" and error["type"] == "rate_limit_error"
        assert client.post("/v1/completions", json=GREEDY | {"n": 3}).status_code == 200
        assert engine.idle and not made.driver.busy


@pytest.mark.parametrize("stream", [False, True])
def test_a_limit_on_time(stream):
    engine = FakeEngine(seconds=0.02)
    with service(engine, limits=Limits(seconds=0.2)) as made:
        client = TestClient(app(made))
        body = GREEDY | {"max_tokens": 400, "ignore_eos": True, "stream": stream}
        response = client.post("/v1/completions", json=body)
        if stream:
            error = json.loads(response.text.split("\n\n")[-2].removeprefix("data: "))["error"]
            assert error["code"] == "timeout" and "[DONE]" not in response.text
        else:
            refused(response, 504, code="timeout")
            assert response.headers["x-should-retry"] == "false"
        assert client.post("/v1/completions", json=GREEDY | {"max_tokens": 2}).status_code == 200
        assert not made.driver.busy


def test_the_key():
    with service(FakeEngine(), api_key="schlüssel") as made:
        client = TestClient(app(made))
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic schlüssel"}):
            given = {name: value.encode() for name, value in given.items()}
            for method, url in (("GET", "/v1/models"), ("POST", "/v1/completions")) + (
                ("POST", "/v1/load_lora_adapter"),
                ("GET", "/metrics"),
                ("GET", "/v1/nothing"),
            ):
                response = client.request(method, url, headers=given)
                refused(response, 401, code="invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
        right = {"Authorization": "bearer schlüssel".encode()}
        assert client.get("/v1/models", headers=right).status_code == 200
        assert client.get("/health").status_code == 200


def test_pages_of_the_web_may_not_use_a_server_without_a_key(shared_client):
    for origin in ("https://evil.example", "null", "http://localhost.evil.example", "http://[::1"):
        response = shared_client.get("/v1/models", headers={"Origin": origin})
        refused(response, 403, code="cross_origin")
    for origin in ("http://localhost:3000", "http://127.0.0.1:8000", "http://[::1]:1"):
        assert shared_client.get("/v1/models", headers={"Origin": origin}).status_code == 200


def test_a_base_without_a_chat_template():
    tokenizer = dataclasses.replace(TOKENIZER, chat_template=None)
    model = dataclasses.replace(MODEL, tokenizer=tokenizer)
    with service(FakeEngine(), model=model) as made:
        response = TestClient(app(made)).post("/v1/chat/completions", json={"model": "red"} | CHAT)
        error = refused(response, 400, param="messages", code="no_chat_template")
        assert "/v1/completions" in error["message"] and "chat_template.jinja" in error["message"]


def test_a_template_that_refuses_a_conversation():
    tokenizer = dataclasses.replace(TOKENIZER, chat_template="{{ raise_exception('no system') }}")
    model = dataclasses.replace(MODEL, tokenizer=tokenizer)
    with service(FakeEngine(), model=model) as made:
        response = TestClient(app(made)).post("/v1/chat/completions", json={"model": "red"} | CHAT)
        assert "no system" in refused(response, 400, param="messages")["message"]


def test_an_engine_that_fails_is_not_used_again():
    engine = FakeEngine()
    with service(engine) as made:
        client = TestClient(app(made))
        engine.broken = True
        refused(client.post("/v1/completions", json=GREEDY), 503, code="failed")
        refused(client.get("/health"), 503, code="failed")
        refused(client.post("/v1/completions", json=GREEDY), 503, code="failed")
        assert client.get("/metrics").status_code == 200


# Bodies that nobody thought of.

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
