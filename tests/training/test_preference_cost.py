"""What a step of DPO costs beside steps of supervised tuning, read from programs that never run.

A while loop is counted once, hence unrolled layers and a single chunk of the loss.
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jaxprs import equations

import lora_jax as lora
from lora_jax import training
from lora_jax.models import SHAPES, llama
from lora_jax.models.llama import LlamaConfig

pytestmark = pytest.mark.mixed_dtypes
WIDE = LlamaConfig(
    vocab_size=8000, hidden_size=1024, intermediate_size=3584, num_layers=2, num_heads=8,
    num_kv_heads=2, head_dim=128, context_length=8192,
)  # fmt: skip
DEEP = LlamaConfig(
    vocab_size=509, hidden_size=64, intermediate_size=176, num_layers=3, num_heads=4,
    num_kv_heads=2, head_dim=16, context_length=128,
)  # fmt: skip


def abstract(config, dtype=jnp.float32):
    def make():
        params = llama.init(config, key=jax.random.key(0), dtype=dtype)
        base, delta = lora.lora_transform(params, lora.LoRA(rank=16), key=jax.random.key(0))
        return training.init_state(delta, optax.adam(1e-3), seed=0), base

    return jax.eval_shape(make)


def lowered(config, loss, rows, length):
    state, base = abstract(config)
    step = jax.jit(training.train_step(loss, optax.adam(1e-3)), donate_argnums=0)
    return step.lower(state, base, loss.abstract_batch(rows, length))


def flops(config, make, rows, length=256):
    loss = make(config, remat="none", unroll=config.num_layers, chunk=10**9)
    return lowered(config, loss, rows, length).cost_analysis()["flops"]


def reference_flops(config, rows, length=256):
    how = {"remat": "none", "unroll": config.num_layers, "chunk": 10**9}
    read = training.target_log_probs(config, **how)
    _, base = abstract(config)
    batch = training.orpo_loss(config).abstract_batch(rows, length)
    pass_ = jax.jit(lambda base, batch: read(lora.bind(base, {}), batch))
    return pass_.lower(base, batch).cost_analysis()["flops"]


def test_a_dpo_step_costs_two_policy_passes_and_one_reference_pass():
    """Of two rows of supervised tuning for each pair, and a pass over both without a gradient:
    1.00001 times as many, as with stored log-probabilities beside the rows alone."""
    policy = flops(WIDE, training.next_token_loss, 8)
    reference = reference_flops(WIDE, 4)
    stored = functools.partial(training.dpo_loss, stored_reference=True)
    print(
        "FLOPS",
        flops(WIDE, training.dpo_loss, 4) / (policy + reference),
        flops(WIDE, stored, 4) / policy,
    )
    assert 0.99 < flops(WIDE, training.dpo_loss, 4) / (policy + reference) <= 1.02
    assert 0.99 < flops(WIDE, stored, 4) / policy <= 1.02
    assert flops(WIDE, training.orpo_loss, 4) / policy <= 1.02


def temporaries(make, rows, length=96):
    loss = make(DEEP, chunk=32)
    return lowered(DEEP, loss, rows, length).compile().memory_analysis().temp_size_in_bytes


def test_with_stored_log_probabilities_dpo_needs_supervised_tuning_s_memory():
    supervised = temporaries(training.next_token_loss, 8)
    stored = temporaries(functools.partial(training.dpo_loss, stored_reference=True), 4)
    assert stored <= 1.1 * supervised


@pytest.mark.parametrize("name", ["dpo", "kto", "simpo"])
def test_logits_of_the_8b_never_stand_whole(name):
    """Neither in float32 nor in bfloat16, of policy or reference: 128 positions at a time."""
    config = SHAPES["llama-3-8b"]
    state, base = abstract(config, jnp.bfloat16)
    loss = training.LOSSES[name].make(config, remat="full")
    step = training.train_step(loss, optax.adam(1e-3))
    program = jax.make_jaxpr(step)(state, base, loss.abstract_batch(2, 2048))
    wide = {
        var.aval.shape
        for eqn in equations(program)
        for var in (*eqn.invars, *eqn.outvars)
        if config.vocab_size in getattr(var.aval, "shape", ())
    }
    weights = {(config.vocab_size, config.hidden_size), (config.hidden_size, config.vocab_size)}
    assert {math.prod(shape) // config.vocab_size for shape in wide - weights} == {128}
