"""What `adapt` costs: nothing beside the same model written with `linear`."""

import re

import cases
import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

import lora_jax as lora
from lora_jax.models import llama

CONFIG = cases.tiny_llama(hidden_size=64, intermediate_size=160, head_dim=16, vocab_size=96)
TOKENS = jax.ShapeDtypeStruct((4, 32), jnp.int32)
# Sizes that nothing else in the program has.
W, X = cases.normal(0, 29, 37), cases.normal(1, 5, 29)


@pytest.fixture(autouse=True)
def optimized():
    jax.config.update("jax_disable_most_optimizations", False)


def compiled_step(forward):
    params = jax.eval_shape(lambda: llama.init(CONFIG, key=jax.random.key(0)))
    delta = jax.eval_shape(
        lambda p: lora.lora_transform(p, lora.LoRA(rank=4), key=jax.random.key(0))[1], params
    )

    def loss(delta, base, tokens):
        logits = forward(lora.bind(base, delta), tokens, CONFIG, remat="elementwise")
        return jax.nn.logsumexp(logits, axis=-1).mean()

    return jax.jit(jax.grad(loss)).lower(delta, params, TOKENS).compile()


@pytest.mark.slow
def test_flops_and_bytes_are_those_of_the_model_written_with_linear():
    ours, theirs = compiled_step(lora.adapt(llama.forward)), compiled_step(llama.forward)
    flops = [step.cost_analysis()["flops"] for step in (ours, theirs)]
    assert flops[0] == pytest.approx(flops[1], rel=0.01)
    temporary = [step.memory_analysis().temp_size_in_bytes for step in (ours, theirs)]
    assert temporary[0] <= 1.02 * temporary[1]


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def scanned(params, x):
    def layer(x, w):
        return x @ w @ jnp.ones((37, 29)), None

    return jax.lax.scan(jax.checkpoint(layer), x, params["w"])[0]


MOVES = {
    "transpose", "reshape", "squeeze", "stop_gradient", "dynamic_slice", "broadcast_in_dim",
    "slice", "gather"
}  # fmt: skip
CALLS = {"scan", "remat2", "checkpoint", "closed_call", "jit", "custom_vjp_call"}
# What a fusion computes stands in the text as well.
COMPILED_MOVES = {
    "parameter", "bitcast", "copy", "transpose", "fusion", "constant", "broadcast", "slice",
    "gather"
}  # fmt: skip
PROGRAMS = {
    "product": (lambda params, x: x @ params["w"], W),
    "transposed": (lambda params, x: x @ params["w"].T, W.T),
    "scan": (scanned, jnp.stack([W, W])),
    "experts": (lambda params, x: jnp.einsum("td,edf->tef", x, params["w"]), jnp.stack([W, W])),
    "convolution": (
        lambda params, x: jax.lax.conv_general_dilated(
            x[None], params["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        jnp.stack([W]),
    ),
    "by_expert": (
        lambda params, x: jax.lax.ragged_dot(x, params["w"], jnp.array([2, 3])),
        jnp.stack([W, W]),
    ),
    "gathered": (
        lambda params, x: jnp.einsum("td,tdf->tf", x, params["w"][jnp.array([0, 1, 1, 0, 1])]),
        jnp.stack([W, W]),
    ),
    "split": (
        lambda params, x: [x @ part for part in jnp.split(params["w"], 2, axis=1)][1],
        jnp.concatenate([W, W], 1),
    ),
    "joined": (lambda params, x: x @ jnp.concatenate([params["w"], params["w"]], axis=1), W),
    "multiplied": (lambda params, x: x @ (params["w"] * x[0][:, None] * 2), W),
    "heads": (lambda params, x: x @ params["w"].reshape(29, 37), W.reshape(29, 37, 1)),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_dense_adapted_weight_is_built(name):
    """Neither in the jaxpr of value and gradient, nor in the compiled program, does anything but a
    move of the frozen weight have its size."""
    run, weight = PROGRAMS[name]
    params = {"w": weight}
    layouts = lora.infer_layouts(run, params, X)
    base, delta = lora.lora_transform(
        params, lora.LoRA(rank=3), targets="w", key=jax.random.key(0), layouts=layouts
    )

    def loss(weigh, run):
        return lambda delta, base: jnp.sin(run(weigh(base, delta), X)).sum()

    def found(weigh, run):
        step = jax.value_and_grad(loss(weigh, run))
        built = {
            eqn.primitive.name
            for eqn in equations(jax.make_jaxpr(step)(delta, base))
            for var in eqn.outvars
            if {29, 37} <= set(var.aval.shape)
        }
        text = jax.jit(step).lower(delta, base).compile().as_text()
        shapes = r"f32\[(?:\d+,)*(?:29,37|37,29)(?:,1)?\]\S* (\w+)\("
        return built, set(re.findall(shapes, text))

    jaxpr, program = found(lora.bind, lora.adapt(run))
    assert jaxpr <= MOVES | CALLS and program <= COMPILED_MOVES
    dense_jaxpr, _ = found(lora.merge, run)
    assert dense_jaxpr & {"add", "dot_general", "mul"}, "the search finds what it looks for"
