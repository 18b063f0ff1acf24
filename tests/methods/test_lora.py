"""LoRA: its formula, its draws, its dropout, its hyperparameters."""

import math

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, moved

import lora_jax as lora

PARAMS = {"q_proj": cases.normal(0, 64, 48)}
X = cases.normal(1, 3, 64)


def made(**kwargs):
    base, delta = lora.lora_transform(PARAMS, lora.LoRA(**kwargs), key=jax.random.key(0))
    return base, delta


@pytest.mark.parametrize(
    ("kwargs", "scale"),
    [
        ({"rank": 4, "alpha": 16}, 4.0),
        ({"rank": 4, "alpha": 16, "scaling": "rslora"}, 8.0),
        ({"rank": 8, "alpha": 2.0}, 0.25),
    ],
)
def test_formula(kwargs, scale):
    base, delta = made(**kwargs)
    delta = moved(delta)
    node = delta["q_proj"]
    expected = X @ base["q_proj"] + scale * (X @ node.a) @ node.b
    assert_close(lora.linear(X, lora.bind(base, delta)["q_proj"]), expected, atol=5e-6)
    assert np.isclose(node.scale, scale)


def test_b_starts_at_zero():
    assert not np.any(made(rank=8)[1]["q_proj"].b)


def test_kaiming_fills_its_interval():
    a = np.asarray(made(rank=32)[1]["q_proj"].a)
    bound = 1 / math.sqrt(64)
    assert np.abs(a).max() <= bound
    assert np.abs(a).max() > 0.98 * bound
    assert abs(a.mean()) < 4 * bound / math.sqrt(3 * a.size)
    assert np.isclose(a.std(), bound / math.sqrt(3), rtol=0.05)


@pytest.mark.parametrize("rank", [8, 32])
def test_gaussian_has_deviation_one_over_rank(rank):
    a = np.asarray(made(rank=rank, init="gaussian")[1]["q_proj"].a)
    assert np.isclose(a.std(), 1 / rank, rtol=0.15)
    assert np.abs(a).max() > 2 / rank  # not uniform


def test_kaiming_counts_every_contracted_axis():
    layout = {"out": lora.Layout(contracted=(-3, -2), output=(-1,))}
    delta = lora.lora_transform(
        {"out": jnp.ones((8, 32, 40))}, lora.LoRA(rank=32), key=jax.random.key(0), layouts=layout
    )[1]
    assert 0.98 / 16 < np.abs(delta["out"].a).max() <= 1 / 16


def dropped(base, delta, seed):
    weights = lora.bind(base, delta, dropout_key=jax.random.key(seed))
    return lora.linear(X, weights["q_proj"])


def test_dropout_keeps_the_expectation():
    base, delta = made(rank=4, dropout=0.3)
    delta = moved(delta)
    draws = jax.vmap(lambda seed: dropped(base, delta, seed))(jnp.arange(2000))
    exact = lora.linear(X, lora.bind(base, delta)["q_proj"])
    error = draws.std(axis=0) / math.sqrt(len(draws))
    assert float(error.min()) > 0
    assert float((jnp.abs(draws.mean(axis=0) - exact) / error).max()) < 5


def test_dropout_is_on_the_adapters_input():
    """Zeroed entries and entries over 1 - rate: seen through an identity adapter."""
    params = {"w": jnp.zeros((64, 64))}
    base, delta = lora.lora_transform(
        params, lora.LoRA(rank=64, alpha=64.0, dropout=0.25), key=jax.random.key(0)
    )
    delta["w"] = delta["w"].replace(a=jnp.eye(64), b=jnp.eye(64))
    weights = lora.bind(base, delta, dropout_key=jax.random.key(1))
    y = np.asarray(lora.linear(jnp.ones((50, 64)), weights["w"]))
    assert set(np.unique(np.round(y, 5))) == {np.float32(0), np.float32(1.33333)}
    assert abs((y == 0).mean() - 0.25) < 0.03


def test_dropout_is_off_without_a_key():
    base, delta = made(rank=4, dropout=0.5)
    plain = made(rank=4)[1]
    for tree in (delta, plain):
        tree["q_proj"] = tree["q_proj"].replace(b=jnp.ones((4, 48)))
    one, other = (lora.linear(X, lora.bind(base, d)["q_proj"]) for d in (delta, plain))
    chex.assert_trees_all_equal(one, other)


def test_rate_zero_is_exact_with_a_key():
    base, delta = made(rank=4)
    delta = moved(delta)
    chex.assert_trees_all_equal(
        dropped(base, delta, 3), lora.linear(X, lora.bind(base, delta)["q_proj"])
    )


def test_a_key_gives_the_same_numbers_again_and_another_key_others():
    base, delta = made(rank=4, dropout=0.5)
    delta = moved(delta)
    chex.assert_trees_all_equal(dropped(base, delta, 3), dropped(base, delta, 3))
    assert np.abs(dropped(base, delta, 3) - dropped(base, delta, 4)).max() > 1e-3


def test_dropout_leaves_the_base_path_alone():
    base, delta = made(rank=4, dropout=0.9)
    assert_close(dropped(base, delta, 3), X @ base["q_proj"])


def test_dropout_differs_between_paths_and_layers():
    same = jnp.broadcast_to(cases.normal(2, 6, 6), (3, 6, 6))
    base, delta = lora.lora_transform(
        {"q_proj": same, "k_proj": same}, lora.LoRA(rank=2, dropout=0.5), key=jax.random.key(0)
    )
    one = jnp.ones((3, 6, 2)), jnp.ones((3, 2, 6))
    delta = {name: node.replace(a=one[0], b=one[1]) for name, node in delta.items()}
    weights = lora.bind(base, delta, dropout_key=jax.random.key(0))
    x = cases.normal(3, 4, 6)
    outputs = [
        jax.vmap(lora.linear, in_axes=(None, 0))(x, weights[name]) for name in ("q_proj", "k_proj")
    ]
    flat = jnp.concatenate(outputs)
    for i in range(6):
        for j in range(i):
            assert np.abs(flat[i] - flat[j]).max() > 1e-3


def test_stacked_layers_drop_what_unstacked_ones_drop():
    stacked, flat = cases.stacked(), {"layers": [{"q_proj": w} for w in
        cases.stacked().params["layers"]["q_proj"]]}  # fmt: skip
    method, key = lora.LoRA(rank=2, dropout=0.5), jax.random.key(9)
    base, delta = lora.lora_transform(stacked.params, method, key=key)
    delta = moved(delta)
    layers = {
        str(i): jax.tree.map(lambda leaf: leaf[i], delta["layers"])  # noqa: B023
        for i in range(3)
    }
    x = cases.normal(3, 4, 6)
    ours = stacked.apply(lora.bind(base, delta, dropout_key=key), x)
    theirs = cases.layer_list().apply(lora.bind(flat, {"layers": layers}, dropout_key=key), x)
    assert_close(ours, theirs, atol=5e-6)


def test_embedding_rows_and_tied_head_use_one_update():
    params = {"embed": cases.normal(0, 10, 6)}
    base, delta = lora.lora_transform(
        params, lora.LoRA(rank=2), targets="embed", key=jax.random.key(0)
    )
    delta = moved(delta)
    weight, merged = lora.bind(base, delta)["embed"], lora.merge(base, delta)["embed"]
    tokens, x = jnp.array([[3, 9, 0]]), cases.normal(1, 2, 6)
    assert_close(lora.embed(tokens, weight), merged[tokens], atol=5e-6)
    assert_close(lora.linear(x, weight.T), x @ merged.T, atol=5e-6)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_gradients_of_any_leading_axes(lead):
    """`widen` has a gradient of its own."""
    base, delta = made(rank=4)
    delta, x = moved(delta), cases.normal(4, *lead, 64)

    def loss(delta, x, merged):
        weight = lora.merge(base, delta) if merged else lora.bind(base, delta)
        return jnp.sin(lora.linear(x, weight["q_proj"])).sum()

    ours = jax.grad(loss, argnums=(0, 1))(delta, x, False)
    theirs = jax.grad(loss, argnums=(0, 1))(delta, x, True)
    assert_close((ours[0]["q_proj"].a, ours[0]["q_proj"].b, ours[1]),
                 (theirs[0]["q_proj"].a, theirs[0]["q_proj"].b, theirs[1]),
                 rtol=1e-4, atol=1e-5)  # fmt: skip


STACKED = {"layers": {"q_proj": cases.normal(5, 3, 8, 6)}}


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_a_rank_for_each_layer_is_each_layers_own_adapter(init):
    method = lora.LoRA(rank=(4, 0, 2), alpha=8.0, init=init)
    base, delta = lora.lora_transform(STACKED, method, key=jax.random.key(0))
    node = delta["layers"]["q_proj"]
    np.testing.assert_array_equal(node.scale, [2, 0, 4])
    assert [np.count_nonzero(np.any(a, axis=0)) for a in np.asarray(node.a)] == [4, 0, 2]
    assert lora.describe(base, delta).rows[0].rank == 4


def test_padding_of_a_rank_for_each_layer_stays_zero():
    case, method = cases.stacked(), lora.LoRA(rank=(4, 0, 2))
    base, delta = lora.lora_transform(case.params, method, key=jax.random.key(0))

    @jax.jit
    @jax.grad
    def step(delta):
        return jnp.sin(case.apply(lora.bind(base, delta), X[:, :6])).sum()

    for _ in range(2):
        gradient = step(delta)
        delta = jax.tree.map(lambda d, g: d - 0.1 * g, delta, gradient)
    node = delta["layers"]["q_proj"]
    for layer, rank in enumerate((4, 0, 2)):
        assert not np.any(node.a[layer, :, rank:]) and not np.any(node.b[layer, rank:])
        assert rank == 0 or np.all(np.any(node.b[layer, :rank], axis=1))


def test_a_rank_for_each_layer_wants_as_many_layers():
    with pytest.raises(ValueError, match=r"layers/q_proj: LoRA\(rank=\(4, 2\)\) names 2 stacked"):
        lora.lora_transform(STACKED, lora.LoRA(rank=(4, 2)), key=jax.random.key(0))


def test_a_zero_a_beside_a_random_b():
    """It changes nothing, and the first gradient is a's."""
    base, delta = made(rank=4, init="zero_a")
    node = delta["q_proj"]
    assert not np.any(node.a)
    b = np.asarray(node.b)
    assert np.abs(b).max() <= 0.5 and b.std() == pytest.approx(0.5 / 3**0.5, rel=0.1)
    gradient = jax.grad(lambda d: jnp.sin(lora.linear(X, lora.bind(base, d)["q_proj"])).sum())(
        delta
    )
    assert np.all(gradient["q_proj"].a) and not np.any(gradient["q_proj"].b)


def test_a_frozen_a_gets_no_gradient_and_no_state():
    base, delta = made(rank=4, train_a=False)
    delta = moved(delta)
    gradient = jax.grad(lambda d: jnp.sin(lora.linear(X, lora.bind(base, d)["q_proj"])).sum())(
        delta
    )
    assert not np.any(gradient["q_proj"].a) and np.all(gradient["q_proj"].b)
    assert lora.describe(base, delta).trainable_params == 4 * 48


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rank": 0}, "rank=0.*at least 1.*None"),
        ({"rank": -4}, "rank=-4"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"rank": "8"}, "rank='8'"),
        ({"rank": (0, 0)}, r"rank=\(0, 0\)"),
        ({"rank": ()}, r"rank=\(\)"),
        ({"alpha": 0}, "alpha=0.*positive"),
        ({"alpha": -1.0}, "alpha=-1.0.*positive"),
        ({"alpha": math.nan}, "alpha=nan.*positive"),
        ({"dropout": 1.0}, r"dropout=1.0.*\[0, 1\)"),
        ({"dropout": -0.1}, r"dropout=-0.1.*\[0, 1\)"),
        ({"scaling": "sqrt"}, "scaling='sqrt'.*lora, rslora"),
        ({"init": "zeros"}, "init='zeros'.*kaiming, gaussian"),
        ({"init": "zero_a", "train_a": False}, "train_a=False.*adapts nothing"),
    ],
)
def test_bad_hyperparameters(kwargs, message):
    with pytest.raises(ValueError, match=message):
        lora.LoRA(**kwargs)
