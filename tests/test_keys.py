"""Every public function with a key takes a typed one or a raw one alike, and refuses all else."""

import inspect
import pkgutil
from importlib import import_module

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax.models import llama
from lora_jax.models.choosing import choose
from lora_jax.models.generate import generate, sample, stream
from lora_jax.models.rotation import random_rotation
from lora_jax.training import init_state

CONFIG, PARAMS, TOKENS = cases.llama_case(num_layers=1)
TREE = {
    "embed": cases.normal(0, 8, 6), "q_proj": cases.normal(1, 6, 5), "k_proj": cases.normal(3, 6, 5)
}  # fmt: skip
DELTA = cases.moved(lora.lora_transform(TREE, lora.LoRA(rank=2), key=jax.random.key(0))[1])
LOGITS = cases.normal(2, 3, 9)
LENGTHS = jnp.array([7, 3])


def bound(key):
    _, delta = lora.lora_transform(TREE, lora.LoRA(rank=2, dropout=0.5), key=jax.random.key(1))
    weights = lora.bind(TREE, cases.moved(delta), dropout_key=key)
    return lora.linear(cases.X, weights["q_proj"])


def written(key):
    sampled = {"max_new_tokens": 2, "eos_id": 0, "temperature": 1.0, "key": key}
    return generate(PARAMS, TOKENS, LENGTHS, CONFIG, **sampled)


def streamed(key):
    sampled = {"max_new_tokens": 2, "eos_id": 0, "temperature": 1.0, "key": key}
    return jnp.stack(list(stream(PARAMS, TOKENS, LENGTHS, CONFIG, **sampled)))


def sampled(key):
    return sample(PARAMS, TOKENS, LENGTHS, CONFIG, max_new_tokens=2, eos_id=0, key=key)


def combined(key):
    return lora.combine([DELTA], [1.0], how="dare", density=0.5, key=key)


def transformed(method, targets="q_proj"):
    return lambda key: lora.lora_transform(TREE, method, targets=targets, key=key)[1]


TAKES_A_KEY = {
    ("lora_jax.transform", "lora_transform"): transformed(lora.LoRA(rank=2)),
    ("lora_jax.transform", "bind"): bound,
    ("lora_jax.arithmetic", "combine"): combined,
    ("lora_jax.models.decoder", "init"): lambda key: llama.init(CONFIG, key=key),
    ("lora_jax.models.rotation", "random_rotation"): lambda key: random_rotation(4, key=key),
    ("lora_jax.models.generate", "generate"): written,
    ("lora_jax.models.generate", "stream"): streamed,
    ("lora_jax.models.generate", "sample"): sampled,
    ("lora_jax.models.choosing", "choose"): lambda key: choose(LOGITS, key, temperature=1.0),
}
CASES = TAKES_A_KEY | {
    ("lora_transform", name): transformed(*method)
    for name, method in {
        "pissa": (lora.LoRA(rank=2, init="pissa_niter_1"),),
        "vera": (lora.VeRA(rank=2),),
        "adalora": (lora.AdaLoRA(rank=2, target_rank=1, total_steps=3),),
        "prompt": (lora.Prompt(length=2), "embed"),
        "prefix": (lora.Prefix(length=2, hidden=3), "k_proj"),
    }.items()
}


def test_no_function_with_a_key_is_missing():
    """But methods, which get theirs from `lora_transform`, and what these functions are made of."""
    inner = {("lora_jax.paths", "keys_for"), ("lora_jax.paths", "one_key")}
    inner |= {("lora_jax.products", "drop")}
    found = set()
    for module in pkgutil.walk_packages(lora.__path__, "lora_jax."):
        if "mosaic" in module.name or ".methods." in module.name:
            continue
        for name, thing in vars(import_module(module.name)).items():
            if inspect.isfunction(thing) and not name.startswith("_"):
                hints = inspect.signature(thing).parameters.items()
                takes = any(
                    key in ("key", "dropout_key") and "Array" in str(hint.annotation)
                    for key, hint in hints
                )
                if takes and thing.__module__ == module.name:
                    found.add((module.name, name))
    assert found - inner == set(TAKES_A_KEY)


@pytest.mark.sampled
@pytest.mark.parametrize("name", CASES, ids="-".join)
def test_a_raw_key_is_the_typed_one(name):
    call = CASES[name]
    typed = call(jax.random.key(3))
    for raw in (jax.random.PRNGKey(3), np.asarray(jax.random.PRNGKey(3))):
        chex.assert_trees_all_equal(call(raw), typed)


WRONG = {
    "a seed": 3,
    "a batch": jax.random.split(jax.random.key(0), 2),
    "a raw batch": jax.random.split(jax.random.PRNGKey(0), 3),
    "floats": jnp.zeros(2),
    "signed": jnp.zeros(2, jnp.int32),
    "another generator's": jax.random.key_data(jax.random.key(0, impl="rbg")),
}


@pytest.mark.parametrize("name", CASES, ids="-".join)
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_key_is_refused(name, wrong):
    with pytest.raises(ValueError, match=r"key: expected one key, such as jax.random.key\(0\)"):
        CASES[name](WRONG[wrong])


def test_raw_keys_under_transformations():
    raw = jax.random.split(jax.random.PRNGKey(0), 3)
    each = jax.jit(jax.vmap(transformed(lora.LoRA(rank=2))))(raw)
    alone = transformed(lora.LoRA(rank=2))(raw[1])
    cases.assert_same_draws(jax.tree.map(lambda leaf: leaf[1], each), alone)


def test_a_state_takes_a_seed():
    def state(seed):
        return init_state(DELTA, optax.sgd(0.1), seed=seed)

    assert state(2**32 - 1).seed == np.uint32(2**32 - 1) and state(np.int64(7)).seed == 7
    assert jax.jit(state)(jnp.int32(5)).seed == 5
    for wrong in (jax.random.key(0), jax.random.PRNGKey(0), -1, 2**32, 0.5, jnp.float32(1)):
        with pytest.raises(ValueError, match=r"seed=.*expected an integer from 0 to 2\*\*32 - 1"):
            state(wrong)
