"""Mixtures of experts: what they cost, what is refused, formats."""

import jax
import jax.numpy as jnp
import pytest
from cases import METHODS, assert_close, moved, normal

import lora_jax as lora

X, EXPERTS = normal(0, 7, 8), normal(1, 3, 8, 6) / 2
SIZES = jnp.array([2, 0, 4])
IDS = jnp.array([[0, 2], [1, 1], [2, 0], [0, 1], [0, 0], [2, 2], [1, 0]])
STACKED = lora.Layout()


def sorted_rows(params, x):
    return jax.lax.ragged_dot(x, params["w"], SIZES)


def gathered(params, x):
    return jnp.einsum("td,tkdf->tkf", x, params["w"][IDS])


def mapped(params, x):
    return jax.vmap(lambda i, x: x @ params["w"][i])(IDS[:, 0], x)


RUNS = {"sorted_rows": sorted_rows, "gathered": gathered, "mapped": mapped}


@pytest.mark.parametrize("name", RUNS)
def test_experts_are_stacked(name):
    found = lora.infer_layouts(RUNS[name], {"w": EXPERTS}, X)
    assert found == {"w": STACKED} and not found["w"].gathered


def test_a_table_of_matrices_that_are_read_as_they_are():
    table = normal(2, 5, 2, 3)

    def run(params, x):
        return params["w"][IDS] * x.sum()

    found = lora.infer_layouts(run, {"w": table}, X)["w"]
    assert found == lora.Layout(contracted=(-3,), output=(-2, -1)) and found.gathered
    returned = lora.infer_layouts(lambda params, x: params["w"][IDS], {"w": table}, X)["w"]
    assert returned == found and returned.gathered


def transformed(method, experts=EXPERTS):
    return lora.lora_transform({"w": experts}, method, targets="w", key=jax.random.key(0))


@pytest.mark.parametrize("name", ["lora", "vera", "adalora", "ia3", "full"])
def test_methods_by_group_sizes(name):
    base, delta = transformed(METHODS[name])
    delta = moved(delta)
    ours = lora.adapt(sorted_rows)(lora.bind(base, delta), X)
    assert_close(ours, sorted_rows(lora.merge(base, delta), X), rtol=1e-4, atol=1e-5)


def test_dropout_by_group_sizes():
    base, delta = transformed(lora.LoRA(rank=2, dropout=0.5))
    outs = [
        lora.adapt(sorted_rows)(lora.bind(base, moved(delta), dropout_key=jax.random.key(i)), X)
        for i in range(2)
    ]
    assert abs(outs[0] - outs[1]).max() > 1e-3


@pytest.mark.parametrize("name", ["dora", "bottleneck"])
def test_methods_that_need_an_expert_at_a_time(name):
    base, delta = transformed(METHODS[name])
    with pytest.raises(ValueError, match="^w: ragged_dot_general, at .* has no form for experts"):
        lora.adapt(sorted_rows)(lora.bind(base, delta), X)
    ours = lora.adapt(gathered)(lora.bind(base, moved(delta)), X)
    if name == "dora":
        assert_close(ours, gathered(lora.merge(base, moved(delta)), X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_quantised_experts(name):
    run = RUNS[name]
    base = lora.quantize({"w": EXPERTS}, "nf4", targets="w", block_size=8)
    _, delta = lora.lora_transform(base, lora.LoRA(rank=2), targets="w", key=jax.random.key(0))
    delta, dense = moved(delta), lora.dequantize(base)

    def loss(delta, x, base):
        return jnp.sin(lora.adapt(run)(lora.bind(base, delta), x)).sum()

    ours, theirs = jax.jit(
        lambda delta, x: [jax.value_and_grad(loss, (0, 1))(delta, x, b) for b in (base, dense)]
    )(delta, X)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_experts_that_were_adapted_as_one_matrix():
    layout = lora.Layout(contracted=(-2,), output=(-3, -1))
    base, delta = lora.lora_transform(
        {"w": EXPERTS}, lora.LoRA(rank=2), targets="w", key=jax.random.key(0), layouts={"w": layout}
    )
    with pytest.raises(ValueError, match="^w: ragged_dot_general, at .* has its experts along"):
        lora.adapt(sorted_rows)(lora.bind(base, delta), X)


def test_flops_are_those_of_the_form_written_by_hand():
    jax.config.update("jax_disable_most_optimizations", False)
    x, experts = normal(0, 64, 96), normal(1, 3, 96, 128)
    sizes = jnp.array([20, 30, 14])
    base, delta = transformed(lora.LoRA(rank=4), experts)

    def run(params, x):
        return jax.lax.ragged_dot(x, params["w"], sizes)

    def by_hand(delta, base, x):
        node = delta["w"]
        h = jax.lax.ragged_dot(x, node.a, sizes)
        scale = jnp.repeat(node.scale, sizes, total_repeat_length=64)[:, None]
        return run(base, x) + jax.lax.ragged_dot(h * scale, node.b, sizes)

    def ours(delta, base, x):
        return lora.adapt(run)(lora.bind(base, delta), x)

    def step(f):
        grads = jax.grad(lambda delta, base, x: jnp.sin(f(delta, base, x)).sum())
        return jax.jit(grads).lower(delta, base, x).compile()

    flops = [step(f).cost_analysis()["flops"] for f in (ours, by_hand)]
    assert flops[0] == pytest.approx(flops[1], rel=0.01)


@pytest.mark.parametrize("method", [lora.LoRA(rank=2), lora.DoRA(rank=2)])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_parts_of_the_outputs_of_a_quantised_weight_as_layers(format, method):
    """Each head of a kernel with its own input."""

    def run(params, x):
        heads = jnp.stack([x, -x, 2 * x], axis=1)
        return jnp.einsum("thi,iho->tho", heads, params["w"].reshape(8, 3, 2))

    base = lora.quantize({"w": EXPERTS[0]}, format, targets="w", block_size=8)
    _, delta = lora.lora_transform(base, method, targets="w", key=jax.random.key(0))
    delta = moved(delta)
    ours = lora.adapt(run)(lora.bind(base, delta), X)
    assert_close(ours, run(lora.merge(base, delta), X), rtol=1e-4, atol=1e-5)
