"""DoRA: its formula with and without dropout, its norm, its merged form."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, moved
from test_protocol_weights import quantized

import lora_jax as lora
from lora_jax.products import drop

PARAMS = {"q_proj": cases.normal(0, 12, 10)}
X = cases.normal(1, 3, 12)
KEY = jax.random.key(0)


def made(params=PARAMS, seed=1, **kwargs):
    method = lora.DoRA(**({"rank": 3, "alpha": 2.0} | kwargs))
    delta = jax.jit(lambda p: lora.lora_transform(p, method, key=KEY, targets=".*")[1])(params)
    return params, moved(delta, seed)


def by_definition(node, w):
    """V, and the length of each of its columns, built."""
    total = w + node.scale * node.a @ node.b
    return total, jnp.linalg.norm(total, axis=0)


def test_formula():
    base, delta = made()
    node = delta["q_proj"]
    total, norm = by_definition(node, PARAMS["q_proj"])
    expected = (X @ total) * (node.magnitude / norm)[None]
    assert_close(lora.linear(X, lora.bind(base, delta)["q_proj"]), expected, atol=5e-6)


def test_formula_with_dropout():
    base, delta = made(dropout=0.5)
    node, w = delta["q_proj"], PARAMS["q_proj"]
    weight = lora.bind(base, delta, dropout_key=KEY)["q_proj"]
    x_drop = drop(X, 0.5, weight.dropout_key)
    assert 0 < (np.asarray(x_drop) == 0).mean() < 1
    c = (node.magnitude / by_definition(node, w)[1])[None]
    low = node.scale * x_drop @ node.a @ node.b
    assert_close(lora.linear(X, weight), X @ w + (c - 1) * (x_drop @ w) + c * low, atol=5e-6)


def test_magnitude_starts_as_the_columns_length():
    node = lora.lora_transform(PARAMS, lora.DoRA(rank=3), key=KEY)[1]["q_proj"]
    assert_close(node.magnitude, jnp.linalg.norm(PARAMS["q_proj"], axis=0))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_norm_is_not_differentiated(dropout):
    base, delta = made(dropout=dropout)
    node, w = delta["q_proj"], PARAMS["q_proj"]
    weight = lora.bind(base, delta, dropout_key=KEY)["q_proj"]
    x_drop = drop(X, dropout, weight.dropout_key)
    norm = by_definition(node, w)[1]

    def fixed(node):
        c = (node.magnitude / norm)[None]
        y = X @ w + (c - 1) * (x_drop @ w) + c * (node.scale * x_drop @ node.a @ node.b)
        return jnp.sin(y).sum()

    def loss(delta):
        bound = lora.bind(base, delta, dropout_key=KEY)["q_proj"]
        return jnp.sin(lora.linear(X, bound)).sum()

    ours, theirs = jax.jit(jax.grad(loss))(delta)["q_proj"], jax.jit(jax.grad(fixed))(node)
    for read in (lambda n: n.a, lambda n: n.b, lambda n: n.magnitude):
        assert_close(read(ours), read(theirs), rtol=1e-4, atol=1e-5)


def test_quantised_base_is_its_dense_form():
    base = {"q_proj": quantized(PARAMS["q_proj"])}
    dense = {"q_proj": base["q_proj"].dense()}
    (_, delta), (_, same) = made(base), made(dense)
    assert_close(delta, same)
    ours, theirs = (lora.linear(X, lora.bind(b, delta)["q_proj"]) for b in (base, dense))
    assert_close(ours, theirs)
    assert_close(lora.merge(base, delta), lora.merge(dense, delta))


def test_embedding_rows_are_those_of_the_merged_table():
    params = {"embed": PARAMS["q_proj"]}
    base, delta = made(params)
    tokens = jnp.array([[3, 9, 0]])
    rows = lora.embed(tokens, lora.bind(base, delta)["embed"])
    assert_close(rows, lora.merge(base, delta)["embed"][tokens], atol=5e-6)
    with pytest.raises(ValueError, match="DoRANode cannot adapt a tied embedding"):
        _ = lora.bind(base, delta)["embed"].T


def test_more_axes_are_one_matrix():
    params = {"kernel": PARAMS["q_proj"].reshape(12, 2, 5)}
    layouts = {"kernel": lora.Layout(contracted=(-3,), output=(-2, -1))}
    base, delta = lora.lora_transform(params, lora.DoRA(rank=3, alpha=2.0), key=KEY,
                                      layouts=layouts)  # fmt: skip
    delta = moved(delta)
    assert delta["kernel"].magnitude.shape == (2, 5)
    merged, matrix = lora.merge(base, delta), delta["kernel"].as_matrix()
    assert_close(lora.unmerge(merged, delta), base)
    assert_close(merged["kernel"].reshape(12, 10), matrix.merge(PARAMS["q_proj"]))
    assert_close(lora.linear(X, lora.Adapted(PARAMS["q_proj"], matrix)),
                 X @ merged["kernel"].reshape(12, 10), atol=5e-6)  # fmt: skip


def test_ranks_and_absent_targets_stack_exactly():
    """A member that lacks a target computes and trains as if it were alone."""
    params = {"q_proj": PARAMS["q_proj"], "k_proj": cases.normal(2, 12, 10)}
    both = made(params)[1]
    one = {"q_proj": made(rank=2)[1]["q_proj"]}

    def loss(delta):
        weights = lora.bind(params, delta)
        return jnp.sin(
            lora.linear(X, weights["q_proj"]) @ lora.linear(X, weights["k_proj"]).T
        ).sum()

    stacked = lora.stack([one, both])
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss)))(stacked)
    alone, gradient = jax.jit(jax.value_and_grad(loss))(one)
    assert np.isclose(values[0], alone, rtol=1e-5) and np.isclose(values[1], loss(both), rtol=1e-5)
    member = lora.unstack(gradients)[0]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(member["k_proj"]))
    assert_close(lora.unstack(gradients, like=[one, both])[0], gradient, rtol=1e-4, atol=1e-5)


def test_a_column_of_zeros_stays_finite():
    params = {"q_proj": PARAMS["q_proj"].at[:, 2].set(0)}
    base, delta = lora.lora_transform(params, lora.DoRA(rank=3), key=KEY)
    assert_close(lora.linear(X, lora.bind(base, delta)["q_proj"]), X @ params["q_proj"])


def test_unmerge_does_not_guess():
    """A column whose update is longer than itself fits two bases."""
    base, delta = made(alpha=200.0)
    back = lora.unmerge(lora.merge(base, delta), delta)["q_proj"]
    node = delta["q_proj"]
    update = jnp.linalg.norm(node.update((12, 10)), axis=0)
    long = np.asarray(update > jnp.linalg.norm(PARAMS["q_proj"], axis=0))
    assert long.any()
    np.testing.assert_array_equal(np.isnan(back).all(axis=0), long)


def test_errors_name_the_method():
    with pytest.raises(ValueError, match=r"DoRA\(rank=0\)"):
        lora.DoRA(rank=0)
    with pytest.raises(ValueError, match=r"q_proj: DoRA\(rank=11\) exceeds"):
        lora.lora_transform(PARAMS, lora.DoRA(rank=11), key=KEY)
