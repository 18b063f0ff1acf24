"""The real `openai` client against a server on a loopback port."""

import asyncio

import openai
import pytest
from fake_engine import FakeEngine
from served import BASE, CHAT, GREEDY, adapter_folder, expected, served

from lora_jax.serving.api.limits import Limits

KEY = "secret"
PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def address():
    limits = Limits(body_bytes=10_000, choices=128)
    with served(FakeEngine(max_waiting=100), limits=limits, api_key=KEY) as (_, address):
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_models(client):
    assert [model.id for model in client.models.list()] == [BASE, "red", "blue"]
    assert client.models.retrieve("red").id == "red"


def test_completions_and_logprobs(client):
    answer = client.completions.create(**GREEDY, logprobs=2)
    assert answer.choices[0].text == expected("hello")[0]
    assert answer.choices[0].logprobs.token_logprobs[0] == -0.5
    assert answer.usage.completion_tokens == expected("hello")[2]


def test_chats_and_logprobs(client):
    answer = client.chat.completions.create(
        model="red", temperature=0, max_tokens=24, logprobs=True, top_logprobs=2, **CHAT
    )
    choice = answer.choices[0]
    assert choice.message.content == expected(PROMPT)[0]
    assert choice.logprobs.content[0].top_logprobs[0].token == choice.logprobs.content[0].token
    again = [*CHAT["messages"], choice.message, {"role": "user", "content": "more"}]
    second = client.chat.completions.create(model="red", temperature=0, messages=again)
    assert second.choices[0].message.content


def test_streams(client):
    stream = client.chat.completions.create(
        model="red",
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
        **CHAT,
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == expected(PROMPT)[0] and last.usage.completion_tokens == expected(PROMPT)[2]
    stream = client.completions.create(**GREEDY, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected("hello")[0]


def test_errors_are_the_clients_own(client, address, tmp_path):
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(**GREEDY | {"model": "green"})
    assert error.value.code == "model_not_found" and error.value.param == "model"
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**GREEDY | {"temperature": 3})
    assert error.value.param == "temperature"
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**GREEDY, extra_body={"temprature": 1})
    with pytest.raises(openai.RateLimitError) as error:
        client.completions.create(**GREEDY, n=101)
    assert error.value.code == "queue_full" and error.value.response.headers["retry-after"] == "1"
    with pytest.raises(openai.APIStatusError) as error:
        client.completions.create(**GREEDY | {"prompt": "x" * 20_000})
    assert error.value.status_code == 413
    stranger = openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_adapters_come_and_go(client, tmp_path):
    folder = adapter_folder(tmp_path, "green")
    load = {"lora_name": "green", "lora_path": str(folder)}
    client.post("/load_lora_adapter", body=load, cast_to=str)
    answer = client.completions.create(**GREEDY | {"model": "green"})
    assert answer.choices[0].text == expected("hello", adapter="green")[0]
    client.post("/unload_lora_adapter", body={"lora_name": "green"}, cast_to=str)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**GREEDY | {"model": "green"})


def test_sixty_four_at_once(address):
    """Half of them stream; a quarter of those are left in the middle."""

    async def one(client, i):
        adapter = ("red", "blue", BASE)[i % 3]
        prompt, limit = f"{i}" * (1 + i), 10 + 3 * i
        body = {"model": adapter, "prompt": prompt, "max_tokens": limit, "temperature": 0}
        wanted = expected(prompt, adapter=None if adapter == BASE else adapter, limit=limit)[0]
        if i % 2:
            answer = await client.completions.create(**body)
            return answer.choices[0].text == wanted
        stream = await client.completions.create(**body, stream=True)
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].text
            if i % 8 == 0 and len(text) > 3:
                await stream.close()
                return wanted.startswith(text)
        return text == wanted

    async def all_of_them():
        url = f"{address}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(64)))

    assert asyncio.run(all_of_them()) == [True] * 64
