"""PEFT's folders behind the API: each answer is what `generate` says with that adapter alone."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import cases
import jax
import numpy as np
import pytest
from starlette.testclient import TestClient

import lora_jax as lora
from lora_jax.interop import peft
from lora_jax.models import decoder
from lora_jax.serving import Engine, NormalForm, peft_store
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


WITHOUT_ROOM = {
    "of a table": (lora.LoRA(rank=2), "embed", "has no room there"),
    "that scales other outputs": (lora.DoRA(rank=2), "lm_head", "has no room there"),
}


@pytest.mark.parametrize("name", WITHOUT_ROOM)
def test_an_adapter_without_room_says_how_to_make_some(served, name):
    method, target, reason = WITHOUT_ROOM[name]
    error = refusal(served, name, served[1].model, method, target)
    assert reason in error and "--max-rank" in error and "--adapters" in error


def test_a_rank_without_room_says_how_to_make_some(served):
    _, alone, _ = served
    wide = NormalForm(*(np.zeros((2, 17, 16), np.float32) for _ in "ab"))
    store = peft_store.PeftStore(alone.model)
    store.put_into(peft_store.make_pool(alone.model.params, [], rows=2, slots=3, max_rank=16))
    with pytest.raises(ValueError, match="of rank 17, .* of rank 16.* --max-rank"):
        store.put("wide", {"layers/attn/q_proj": wide})


OTHER_BASES = {
    "wider": {"hidden_size": 32},
    "deeper": {"num_layers": 3},
    "shallower": {"num_layers": 1},
    "of other weights": {},
}


@pytest.mark.parametrize("name", OTHER_BASES)
def test_an_adapter_of_another_base_is_refused(served, name):
    config = dataclasses.replace(serving_models.LLAMA, **OTHER_BASES[name])
    params = decoder.init(config, key=jax.random.key(1))
    other = dataclasses.replace(served[1].model, params=params, config=config)
    error = refusal(served, name, other, lora.LoRA(rank=2), "all-linear")
    assert "--max-rank" not in error and name in error  # of the folder


def refusal(served, name, base, method, target):
    """What a server says of an adapter of this base, and that it answers the others on."""
    service, alone, parent = served
    _, delta = lora.lora_transform(base.params, method, targets=[target], key=jax.random.key(0))
    names, heads = peft.model_names(base.config), base.config.num_kv_heads
    peft.save_adapter(parent / name, delta, base.params, names, num_kv_heads=heads)
    client = TestClient(app(service))
    load = {"lora_name": name, "lora_path": str(parent / name)}
    response = client.post("/v1/load_lora_adapter", json=load)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == "lora_path"
    assert error["code"] == "adapter_not_served" and service.catalog.get(name) is None
    body = {"model": "lora", "prompt": "abcd", "max_tokens": 9, "temperature": 0}
    answer = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert answer == text_of(alone, "abcd", "lora", 9)
    return error["message"]
