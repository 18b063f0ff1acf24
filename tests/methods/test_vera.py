"""VeRA: its formula, and the projection that its targets share."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, moved

import lora_jax as lora
from lora_jax.methods import VeRAProjection

PARAMS = {"q_proj": cases.normal(0, 6, 5), "down_proj": cases.normal(1, 4, 8)}
METHOD = lora.VeRA(rank=16)
X, KEY = cases.normal(2, 3, 6), jax.random.key(0)


def made(method=METHOD, params=PARAMS, **kwargs):
    delta = jax.jit(lambda p: lora.lora_transform(p, method, key=KEY, **kwargs)[1])(params)
    return dict(params), moved(delta)


def test_formula_takes_leading_rows_and_columns():
    base, delta = made()
    node, pair = delta["q_proj"], delta[METHOD.projection]
    assert pair.a.shape == (6, 16) and pair.b.shape == (16, 8)  # a rank may exceed the matrix
    inner = (X @ pair.a[:6]) * node.lambda_d[None]
    expected = X @ PARAMS["q_proj"] + (inner @ pair.b[:, :5]) * node.lambda_b[None]
    assert_close(lora.linear(X, lora.bind(base, delta)["q_proj"]), expected, atol=5e-6)


def test_draws():
    _, delta = lora.lora_transform(PARAMS, lora.VeRA(rank=256, d_initial=0.3), key=KEY)
    pair = next(node for node in delta.values() if isinstance(node, VeRAProjection))
    for leaf, fan_in in ((pair.a, 6), (pair.b, 256)):
        bound = np.sqrt(6 / fan_in)
        assert 0.98 * bound < np.abs(leaf).max() <= bound
    node = delta["q_proj"]
    assert np.allclose(node.lambda_d, 0.3) and not np.any(node.lambda_b)


def test_projection_is_stored_once_frozen_and_out_of_the_weights():
    base, delta = made()
    assert set(delta) == {"q_proj", "down_proj", METHOD.projection}
    assert set(lora.bind(base, delta)) == set(PARAMS)
    assert lora.describe(base, delta).trainable_params == 2 * 16 + 5 + 8


def test_an_imported_projection_is_used():
    base, delta = made()
    other = VeRAProjection(a=cases.normal(5, 9, 16), b=cases.normal(6, 16, 8))
    delta[METHOD.projection] = other
    merged = lora.merge(base, delta)["q_proj"]
    node = delta["q_proj"]
    update = (other.a[:6] * node.lambda_d[None]) @ other.b[:, :5] * node.lambda_b[None]
    assert_close(merged, PARAMS["q_proj"] + update, atol=5e-6)


def test_two_methods_have_projections_of_their_own():
    rules = {"q_proj": METHOD, "down_proj": lora.VeRA(rank=3)}
    base, delta = made(rules)
    assert len(delta) == 4 and delta[METHOD.projection].b.shape == (16, 5)
    assert_close(lora.linear(X, lora.bind(base, delta)["q_proj"]),
                 X @ lora.merge(base, delta)["q_proj"], atol=5e-6)  # fmt: skip


def test_more_axes():
    params = {"kernel": cases.normal(3, 6, 2, 5)}
    layouts = {"kernel": lora.Layout(contracted=(-3,), output=(-2, -1))}
    base, delta = made(params=params, layouts=layouts)
    assert delta["kernel"].lambda_b.shape == (2, 5)
    assert delta[METHOD.projection].b.shape == (16, 10)
    weight = lora.bind(base, delta)["kernel"].as_matrix(layouts["kernel"])
    merged = lora.merge(base, delta)["kernel"].reshape(6, 10)
    assert_close(lora.linear(X, weight), X @ merged, atol=5e-6)


def test_a_target_that_a_member_lacks_does_not_train():
    both = made()[1]
    one = {name: node for name, node in both.items() if name != "down_proj"}

    def loss(delta):
        weights = lora.bind(PARAMS, delta)
        return jnp.sin(lora.linear(X, weights["q_proj"])).sum() + jnp.sin(
            lora.linear(X[:, :4], weights["down_proj"])
        ).sum()  # fmt: skip

    gradients = jax.jit(jax.vmap(jax.grad(loss)))(lora.stack([one, both]))["down_proj"]
    assert not np.any(gradients.lambda_d[0]) and not np.any(gradients.lambda_b[0])
    assert np.all(gradients.lambda_b[1])


@pytest.mark.parametrize("call", [lora.bind, lora.merge])
def test_errors(call):
    base, delta = made()
    path = METHOD.projection
    small = delta | {path: VeRAProjection(a=jnp.ones((4, 16)), b=jnp.ones((16, 8)))}
    with pytest.raises(ValueError, match=r"q_proj: cannot share.*at least \(6, 16\)"):
        call(base, small)
    lacking = {name: node for name, node in delta.items() if name != path}
    with pytest.raises(ValueError, match=f"the delta lacks '{path}'"):
        call(base, lacking)


@pytest.mark.parametrize("kwargs", [{"rank": 0}, {"rank": 1.5}, {"dropout": 1.0}])
def test_bad_hyperparameters(kwargs):
    with pytest.raises(ValueError, match=rf"VeRA\({next(iter(kwargs))}="):
        lora.VeRA(**kwargs)


def test_a_quantised_weight_tells_its_own_axes():
    """Also to the projection, which is drawn for them."""
    layouts = {"kernel": lora.Layout(contracted=(-3, -2), output=(-1,))}
    base = lora.quantize({"kernel": cases.normal(0, 4, 4, 6)}, "nf4", block_size=8, layouts=layouts)
    _, delta = lora.lora_transform(base, METHOD, targets="kernel", key=jax.random.key(0))
    assert delta[METHOD.projection].a.shape[0] == 16
    assert lora.bind(base, delta)["kernel"].shape == (4, 4, 6)
