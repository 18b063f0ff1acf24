"""OpenAI's forms over an engine, through the ASGI app: what is answered."""

import json

import fake_engine
import pytest
from fake_engine import TOKENIZER, FakeEngine
from served import BASE, CHAT, GREEDY, adapter_folder, expected, refused, service
from starlette.testclient import TestClient

from lora_jax.serving.api.app import app


@pytest.fixture
def client():
    with service(FakeEngine()) as made, TestClient(app(made)) as client:
        client.service = made
        yield client


def sent_events(response):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, last = [line for line in response.text.split("\n\n") if line]
    assert last == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


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
