"""LoHa: its formula, with and without a merged form, and what its arguments may be."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, moved

import lora_jax as lora

PARAMS = {"q_proj": cases.normal(0, 3, 6, 5)}
X = cases.normal(1, 4, 6)


def made(**settings):
    method = lora.LoHa(rank=2, alpha=3.0, **settings)
    return lora.lora_transform(PARAMS, method, key=jax.random.key(0))[1]


def test_formula():
    delta = moved(made(), size=0.3)
    node = delta["q_proj"]
    update = 1.5 * (node.a1 @ node.b1) * (node.a2 @ node.b2)
    assert_close(lora.merge(PARAMS, delta)["q_proj"], PARAMS["q_proj"] + update, atol=1e-5)
    assert np.linalg.matrix_rank(np.asarray(update[0]), tol=1e-5) == 4
    weights = jax.tree.map(lambda leaf: leaf[1], lora.bind(PARAMS, delta))["q_proj"]
    assert_close(lora.linear(X, weights), X @ (PARAMS["q_proj"] + update)[1], atol=1e-5)


def test_a_new_one_changes_nothing_and_trains_at_once():
    delta = made()
    assert_close(lora.merge(PARAMS, delta)["q_proj"], PARAMS["q_proj"])
    gradient = jax.grad(lambda d: jnp.sum(lora.merge(PARAMS, d)["q_proj"] ** 2))(delta)
    assert np.any(gradient["q_proj"].a2) and not np.any(gradient["q_proj"].a1)


def test_ranks_stack_exactly():
    small = moved(made(), size=0.3)
    large = lora.lora_transform(PARAMS, lora.LoHa(rank=4), key=jax.random.key(1))[1]
    stacked = lora.stack([small, moved(large, size=0.3)])
    one = jax.tree.map(lambda leaf: leaf[0], stacked)
    assert_close(lora.merge(PARAMS, one), lora.merge(PARAMS, small))

    def loss(delta):
        return jnp.sum(lora.merge(PARAMS, delta)["q_proj"] ** 2)

    padded, alone = jax.grad(loss)(one)["q_proj"], jax.grad(loss)(small)["q_proj"]
    assert_close(padded.a1[..., :2], alone.a1)
    assert not np.any(padded.a1[..., 2:]) and not np.any(padded.b2[:, 2:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rank": 0}, "at least 1"), ({"alpha": 0}, "positive alpha"), ({"dropout": 1}, "rate in")],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        lora.LoHa(**settings)
