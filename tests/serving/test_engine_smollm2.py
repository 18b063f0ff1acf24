"""The default model, in a batch of different adapters, says what it says alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.interop import load
from lora_jax.models.generate import generate
from lora_jax.serving import Engine, Request

PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "The three primary colours are",
    "To be, or not to be,",
]


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.optimized
def test_smollm2_in_a_batch_is_smollm2_alone():
    from serving_models import StackPool

    model = load()
    deltas = {}
    for i in range(2):
        method, key = lora.LoRA(rank=4 + 4 * i, alpha=16), jax.random.key(i)
        _, delta = lora.lora_transform(model.params, method, key=key)
        deltas[f"a{i}"] = jax.tree.map(lambda leaf: leaf + 0.004, delta)
    engine = Engine(model, StackPool(deltas), rows=4, pages=8, chunk=8, max_length=64)
    asked, said = {}, {}
    for i, prompt in enumerate(PROMPTS):
        tokens = tuple(model.tokenizer.encode(prompt))
        adapter = [None, "a0", "a1"][i % 3]
        ticket = engine.submit(Request(tokens=tokens, adapter=adapter, max_new_tokens=32))
        asked[ticket] = tokens, adapter
    while not engine.idle:
        for event in engine.step():
            said.setdefault(event.ticket, []).extend(event.tokens)
    assert engine.stats()["preempted"]
    eos_id = model.tokenizer.eos_id
    alone = jax.jit(
        functools.partial(generate, config=model.config, max_new_tokens=32, eos_id=eos_id)
    )
    for ticket, (tokens, adapter) in asked.items():
        weights = model.params if adapter is None else lora.bind(model.params, deltas[adapter])
        prompt = np.zeros((1, 16), np.int32)
        prompt[0, : len(tokens)] = tokens
        expected = alone(weights, prompt, jnp.array([len(tokens)]))[0].tolist()
        if eos_id in expected:
            expected = expected[: expected.index(eos_id) + 1]
        assert said[ticket] == expected
