"""A service over the fake engine, in this process: as an ASGI app, or on a loopback port."""

import contextlib
import json
import threading
import time
from pathlib import Path

import fake_engine
from fake_engine import TOKENIZER, FakeEngine

from lora_jax.serving.api.catalog import Catalog
from lora_jax.serving.api.driver import Driver
from lora_jax.serving.api.generation import Service
from lora_jax.serving.api.limits import Limits
from lora_jax.serving.api.served_model import ServedModel
from lora_jax.serving.api.server import Server, listen
from lora_jax.serving.request import Request, Sampling

BASE = "tiny"
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
GREEDY = {"model": "red", "prompt": "hello", "temperature": 0, "max_tokens": 24}
MODEL = ServedModel(
    name=BASE,
    tokenizer=fake_engine.TOKENIZER,
    context_length=fake_engine.CONTEXT,
    vocab_size=fake_engine.VOCAB,
)


def adapter_folder(parent: Path, name: str, **config) -> Path:
    folder = parent / name
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "value": name} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@contextlib.contextmanager
def service(engine: FakeEngine, *, model=MODEL, limits=None, api_key=None, catalog=None):
    """A service whose engine runs, with the adapters of `catalog`, or red and blue."""
    driver = Driver(engine)
    if catalog is None:
        catalog = Catalog(model.name, engine)
        for name in ("red", "blue"):
            engine.put(name, name)
            catalog.add(name, Path(name))
    driver.start()
    try:
        yield Service(
            driver=driver,
            model=model,
            catalog=catalog,
            limits=limits or Limits(),
            api_key=api_key,
        )
    finally:
        driver.stop()


@contextlib.contextmanager
def on_loopback(made: Service, *, grace=5.0):
    """The address of a server in a thread of this process."""
    listening = listen("127.0.0.1", 0)
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = Server(made, grace=grace)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield address
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextlib.contextmanager
def served(engine: FakeEngine, *, grace=5.0, **kwargs):
    """A service and its address."""
    with service(engine, **kwargs) as made, on_loopback(made, grace=grace) as address:
        yield made, address


def wait_until(happened, seconds=5.0):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


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
