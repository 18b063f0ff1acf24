"""Bottleneck adapters and the fusion of several: formulas, exact stacks, errors."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, moved

import lora_jax as lora

PARAMS = {"o_proj": cases.normal(0, 6, 5), "down_proj": cases.normal(1, 6, 5)}
X, KEY = cases.normal(2, 3, 6), jax.random.key(0)


@functools.cache
def fresh(method):
    return jax.jit(lambda p: lora.lora_transform(p, method, key=KEY)[1])(PARAMS)


def made(method, seed=1, params=PARAMS, **kwargs):
    if params is PARAMS and not kwargs:
        return params, moved(fresh(method), seed, size=0.7)
    delta = jax.jit(lambda p: lora.lora_transform(p, method, key=KEY, **kwargs)[1])(params)
    return params, moved(delta, seed, size=0.7)


def mlp(node, read, f):
    inner = f(read @ node.down + node.down_bias[None])
    return node.scale * (inner @ node.up + node.up_bias[None])


@pytest.mark.parametrize(
    ("name", "f"), [("relu", jax.nn.relu), ("gelu", jax.nn.gelu), ("silu", jax.nn.silu)]
)
def test_formulas(name, f):
    h = X @ PARAMS["o_proj"]
    for parallel, read in ((False, h), (True, X)):
        method = lora.Bottleneck(size=4, activation=name, parallel=parallel, scale=2.0)
        base, delta = made(method)
        assert delta["o_proj"].down.shape == (6 if parallel else 5, 4)
        y = lora.linear(X, lora.bind(base, delta)["o_proj"])
        assert_close(y, h + mlp(delta["o_proj"], read, f), atol=5e-6)


def test_sizes_and_absent_targets_stack_exactly():
    both, one = made(lora.Bottleneck(size=4))[1], made(lora.Bottleneck(size=2), 2)[1]
    del one["down_proj"]

    def loss(delta):
        weights = lora.bind(PARAMS, delta)
        return sum(jnp.sin(lora.linear(X, weight)).sum() for weight in weights.values())

    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss)))(lora.stack([one, both]))
    alone, gradient = jax.jit(jax.value_and_grad(loss))(one)
    assert np.isclose(values[0], alone, rtol=1e-5)
    members = lora.unstack(gradients)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(members[0]["down_proj"]))
    assert_close(lora.unstack(gradients, like=[one, both])[0], gradient, rtol=1e-4, atol=1e-5)
    padding = members[0]["o_proj"]
    assert not np.any(padding.down[:, 2:]) and not np.any(padding.up[2:])


@pytest.mark.parametrize("parallel", [False, True])
def test_more_axes(parallel):
    params = {"kernel": PARAMS["o_proj"].reshape(2, 3, 5)}
    layouts = {"kernel": lora.Layout(contracted=(-3, -2), output=(-1,))}
    method = lora.Bottleneck(size=4, parallel=parallel)
    base, delta = made(method, params=params, layouts=layouts)
    node, flat = delta["kernel"], made(method)[1]["o_proj"]
    assert node.down.shape == ((2, 3, 4) if parallel else (5, 4))
    same = jax.tree.map(lambda ours, theirs: ours.reshape(theirs.shape), node.as_matrix(), flat)
    y = lora.linear(X, lora.Adapted(PARAMS["o_proj"], same))
    weight = lora.bind(base, delta)["kernel"].as_matrix(layouts["kernel"])
    assert_close(lora.linear(X, weight), y)


def test_fusion_formula():
    deltas = [made(lora.Bottleneck(size=size), size)[1] for size in (2, 4)]
    base, delta = made(lora.Fusion(adapters=deltas), 5)
    assert set(delta) == set(PARAMS)  # the adapters' own targets
    node, h = delta["o_proj"], X @ PARAMS["o_proj"]
    z = jnp.stack([mlp(d["o_proj"], h, jax.nn.relu) for d in deltas])
    query = h @ node.query + node.query_bias[None]
    weights = jax.nn.softmax((query[None] * (z @ node.key)).sum(-1), axis=0)
    expected = (weights[..., None] * (z + h[None])).sum(0) @ node.value
    assert_close(lora.linear(X, lora.bind(base, delta)["o_proj"]), expected, rtol=1e-4, atol=1e-5)


def test_fusion_of_an_adapter_with_itself_starts_as_that_adapter():
    one = made(lora.Bottleneck(size=2))[1]
    base, delta = lora.lora_transform(PARAMS, lora.Fusion(adapters=[one, one]), key=KEY)
    ours, theirs = (lora.linear(X, lora.bind(base, d)["o_proj"]) for d in (delta, one))
    assert_close(ours, theirs)


def test_fusion_trains_the_attention_alone_over_scanned_layers():
    case = cases.stacked()
    deltas = [made(lora.Bottleneck(size=2), seed, case.params)[1] for seed in (1, 2)]
    base, delta = made(lora.Fusion(adapters=deltas), 3, case.params)
    x = cases.normal(4, 2, 6)

    def loss(delta):
        return jnp.sin(case.apply(lora.bind(base, delta), x)).sum()

    gradient = jax.jit(jax.grad(loss))(delta)
    received = jax.tree.map(lambda g: bool(np.any(g)), gradient)
    assert received == lora.trainable_mask(delta)
    layers = {"layers": [{"q_proj": w} for w in case.params["layers"]["q_proj"]]}
    flat = {"layers": {str(i): jax.tree.map(lambda leaf: leaf[i], delta["layers"])  # noqa: B023
                       for i in range(3)}}  # fmt: skip
    apply = cases.layer_list().apply
    unscanned = jax.jit(lambda d: apply(lora.bind(layers, d), x))(flat)
    assert_close(case.apply(lora.bind(base, delta), x), unscanned, rtol=1e-4, atol=1e-5)
    trained = 3 * (3 * 36 + 6)
    assert lora.describe(base, delta).trainable_params == trained


def bad(adapters, match):
    with pytest.raises(ValueError, match=match):
        lora.lora_transform(PARAMS, lora.Fusion(adapters=adapters), key=KEY)


def test_fusion_of_adapters_of_different_bases():
    here = made(lora.Bottleneck(size=2))[1]
    fewer = made(lora.Bottleneck(size=2), targets="o_proj")[1]
    other = made(lora.Bottleneck(size=2), params={n: w[:, :4] for n, w in PARAMS.items()})[1]
    bad([here, fewer], "down_proj: adapter 1 of the Fusion has nothing here.*one base")
    bad([here, made(lora.LoRA(rank=2))[1]], "down_proj: adapter 1 of the Fusion has LoRANode")
    bad([here, other], r"down_proj: an adapter .* shape \(6, 4\), the base has \(6, 5\)")
    bad([here, made(lora.Bottleneck(size=2, parallel=True))[1]], "differ in activation, `parallel`")
    with pytest.raises(ValueError, match="Fusion of 1 adapters: expected two or more"):
        lora.Fusion(adapters=[here])


@pytest.mark.parametrize("method", [
    lora.Bottleneck(size=2), lora.Fusion(adapters=[made(lora.Bottleneck(size=2))[1]] * 2),
])  # fmt: skip
def test_no_merged_form(method):
    base, delta = made(method)
    for call in (lora.merge, lora.unmerge):
        with pytest.raises(ValueError, match="down_proj: a .* it has no merged form"):
            call(base, delta)


@pytest.mark.parametrize("kwargs", [{"size": 0}, {"activation": "tanh"}])
def test_bad_hyperparameters(kwargs):
    with pytest.raises(ValueError, match=rf"Bottleneck\({next(iter(kwargs))}="):
        lora.Bottleneck(**kwargs)
