"""PEFT's folders behind the API: each answer is what `generate` says with that adapter alone."""

from concurrent.futures import ThreadPoolExecutor

import cases
import jax
import pytest
from starlette.testclient import TestClient

import lora_jax as lora
from lora_jax.interop import peft
from lora_jax.serving.api.app import app
from lora_jax.serving.api.catalog import Catalog
from lora_jax.serving.api.driver import Driver
from lora_jax.serving.api.generation import Service
from lora_jax.serving.api.limits import Limits
from lora_jax.serving.api.served_model import ServedModel

serving_models = pytest.importorskip("serving_models")

METHODS = {
    "lora": lora.LoRA(rank=2, alpha=4),
    "wide": lora.LoRA(rank=10, alpha=10, scaling="rslora"),
    "dora": lora.DoRA(rank=3, alpha=6),
    "ia3": lora.IA3(),
}
SIZES = dict(rows=2, readers=2, page_size=4, pages=20, chunk=5, max_length=40)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    from lora_jax.serving import peft_store
    from lora_jax.serving.engine import Engine

    parent = tmp_path_factory.mktemp("adapters")
    model = serving_models.model_of(serving_models.LLAMA)
    names = peft.model_names(model.config)
    for name, method in METHODS.items():
        targets = ["q_proj", "down_proj"] if name in ("ia3", "wide") else "all-linear"
        delta = cases.llama_delta(model.params, method, targets=targets)
        heads = model.config.num_kv_heads
        peft.save_adapter(parent / name, delta, model.params, names, num_kv_heads=heads)
    deltas = {name: peft.load_adapter(parent / name, model.params, names) for name in METHODS}
    store = peft_store.PeftStore(model)
    folders = [parent / name for name in METHODS]
    ahead = store.read_ahead([*folders, parent / "none"])
    assert len(ahead) == len(METHODS)
    pool = peft_store.make_pool(model.params, ahead, rows=2, slots=3, max_rank=4)
    store.put_into(pool)
    catalog = Catalog(model.name, store)
    for folder in folders:
        catalog.take_in(folder.name, folder)
    engine = Engine(model, pool, **SIZES)
    driver = Driver(engine)
    driver.start()
    facts = ServedModel(
        name=model.name,
        tokenizer=model.tokenizer,
        context_length=engine.max_length,
        vocab_size=model.config.vocab_size,
    )
    service = Service(driver=driver, model=facts, catalog=catalog, limits=Limits())
    yield service, serving_models.Alone(model, deltas), parent
    driver.stop()


def text_of(alone, prompt, adapter, count):
    tokenizer = alone.model.tokenizer
    tokens = alone(tuple(tokenizer.encode(prompt)), adapter, count)
    return tokenizer.decode(tokens, skip_special_tokens=True).replace(tokenizer.eos_token, "")


def test_each_answer_is_its_adapters_own(served):
    service, alone, _ = served
    names = [service.model.name, *METHODS]
    asked = [(names[i % 5], "abcdefgh"[i % 8] * (1 + i % 7), 1 + i % 12) for i in range(30)]

    with TestClient(app(service)) as client, ThreadPoolExecutor(10) as threads:

        def ask(one):
            name, prompt, count = one
            body = {"model": name, "prompt": prompt, "max_tokens": count, "temperature": 0}
            return client.post("/v1/completions", json=body).json()["choices"][0]["text"]

        answers = list(threads.map(ask, asked))
    adapters = [None if name == service.model.name else name for name, *_ in asked]
    for answer, adapter, (_, prompt, count) in zip(answers, adapters, asked, strict=True):
        assert answer == text_of(alone, prompt, adapter, count), (adapter, prompt, count)
    assert len({text_of(alone, "abc", name, 12) for name in [None, *METHODS]}) == 5


def test_an_adapter_that_is_loaded_again_says_the_same(served):
    service, alone, parent = served
    client = TestClient(app(service))
    body = {"model": "again", "prompt": "abcd", "max_tokens": 9, "temperature": 0}
    for folder in ("dora", "lora", "lora"):
        load = {"lora_name": "again", "lora_path": str(parent / folder)}
        assert client.post("/v1/load_lora_adapter", json=load).status_code == 200
        answer = client.post("/v1/completions", json=body).json()
        assert answer["choices"][0]["text"] == text_of(alone, "abcd", folder, 9)
        unload = client.post("/v1/unload_lora_adapter", json={"lora_name": "again"})
        assert unload.status_code == 200


def test_what_a_server_cannot_compute_says_so(served):
    service, _, parent = served
    model = serving_models.model_of(serving_models.LLAMA)
    names, key = peft.model_names(model.config), jax.random.key(0)
    _, delta = lora.lora_transform(model.params, lora.LoRA(rank=2), targets=["embed"], key=key)
    peft.save_adapter(parent / "table", delta, model.params, names, num_kv_heads=2)
    load = {"lora_name": "table", "lora_path": str(parent / "table")}
    response = TestClient(app(service)).post("/v1/load_lora_adapter", json=load)
    assert response.status_code == 400 and response.json()["error"]["param"] == "lora_path"
    assert "no room there" in response.json()["error"]["message"]
