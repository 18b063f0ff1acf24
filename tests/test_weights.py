"""The seam: linear, embed, transpose and scan_layers over weights of every type."""

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, moved

import lora_jax as lora
from lora_jax.weights import Shared, dense, scan_layers, transpose

X = cases.normal(1, 2, 3, 6)
TOKENS = jnp.array([[0, 5, 2], [1, 1, 4]])


def adapted(array: jax.Array, method=None) -> lora.Adapted:
    tree = {"w": array}
    base, delta = lora.lora_transform(tree, method or lora.LoRA(rank=2), key=jax.random.key(0))
    return lora.bind(base, moved(delta))["w"]


W = cases.normal(0, 6, 5)
WEIGHTS = {
    "array": W,
    "transposed": transpose(jnp.swapaxes(W, 0, 1)),
    "adapted": adapted(W),
    "adapted_transposed": transpose(adapted(W.T)),
}


@pytest.fixture(params=WEIGHTS)
def weight(request):
    return WEIGHTS[request.param]


def test_linear_multiplies_by_the_dense_weight(weight):
    assert_close(lora.linear(X, weight), X @ dense(weight), atol=5e-6)


@pytest.mark.sampled
def test_linear_takes_any_leading_axes(weight):
    assert_close(lora.linear(X[0, 0], weight), lora.linear(X, weight)[0, 0], atol=5e-6)


@pytest.mark.parametrize("name", ["array", "transposed", "adapted"])
def test_embed_takes_rows_of_the_dense_weight(name):
    weight = WEIGHTS[name]
    assert_close(lora.embed(TOKENS, weight), dense(weight)[TOKENS], atol=5e-6)


def test_transpose_is_that_of_the_dense_weight(weight):
    turned = transpose(weight)
    assert turned.shape == (5, 6) and weight.shape == (6, 5)
    assert_close(dense(turned), dense(weight).T, atol=5e-6)
    assert_close(dense(transpose(turned)), dense(weight), atol=5e-6)


def test_weights_pass_through_jit(weight):
    assert_close(jax.jit(lora.linear)(X, weight), lora.linear(X, weight), atol=5e-6)


def test_a_weight_looks_like_its_array(weight):
    assert (weight.shape, weight.ndim, weight.dtype) == ((6, 5), 2, jnp.float32)


def test_binding_computes_nothing():
    case = cases.nested()
    base, delta = cases.transform(case, lora.LoRA(rank=2))
    primitives = {eqn.primitive.name for eqn in jax.make_jaxpr(lora.bind)(base, delta).jaxpr.eqns}
    assert not primitives & {"dot_general", "add", "mul"}


def test_scan_layers_is_scan():
    layers, x = cases.normal(2, 4, 3, 3), cases.normal(3, 2, 3)

    def body(x, w):
        return jnp.tanh(x @ w), x.sum()

    chex.assert_trees_all_equal(scan_layers(body, x, layers), jax.lax.scan(body, x, layers))


def test_scan_layers_shows_shared_values_whole():
    whole = cases.normal(4, 3, 3)

    def body(x, layer):
        assert layer["shared"].value["m"].shape == (3, 3)
        return jnp.tanh(x @ (layer["w"] + layer["shared"].value["m"])), None

    layers = {"w": cases.normal(2, 4, 3, 3), "shared": Shared({"m": whole})}
    ours, _ = scan_layers(body, cases.normal(3, 2, 3), layers)
    repeated = {"w": layers["w"] + whole[None]}
    theirs, _ = jax.lax.scan(
        lambda x, layer: (jnp.tanh(x @ layer["w"]), None), cases.normal(3, 2, 3), repeated
    )
    assert_close(ours, theirs)


def test_scan_layers_sends_gradients_to_shared_values():
    layers = cases.normal(2, 4, 3, 3)

    def loss(shared):
        def body(x, layer):
            return x @ (layer["w"] * layer["s"].value), None

        x, _ = scan_layers(body, jnp.ones((1, 3)), {"w": layers, "s": Shared(shared)})
        return x.sum()

    one = jnp.float32(1)
    assert np.isclose(jax.grad(loss)(one), 4 * loss(one), rtol=1e-5)


def test_unroll_changes_nothing():
    layers, x = cases.normal(2, 4, 3, 3), cases.normal(3, 2, 3)
    body = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
    assert_close(scan_layers(body, x, layers, unroll=4), scan_layers(body, x, layers))


def test_rows_of_different_adapters_have_no_dense_form():
    base, delta = cases.transform(cases.nested(), lora.LoRA(rank=2))
    weights = lora.bind(base, lora.stack([delta, delta]), adapter_ids=jnp.array([0, 1]))
    with pytest.raises(ValueError, match="no single dense form"):
        dense(weights["block"]["q_proj"])
