"""What one client may take of a server, its key, and what a server cannot do."""

import dataclasses
import json

import pytest
from fake_engine import TOKENIZER, FakeEngine
from served import CHAT, GREEDY, MODEL, refused, service
from starlette.testclient import TestClient

from lora_jax.serving.api.app import app
from lora_jax.serving.api.limits import Limits


@pytest.fixture(scope="module")
def shared_client():
    with service(FakeEngine()) as made, TestClient(app(made)) as client:
        yield client


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
