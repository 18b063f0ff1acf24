"""No batch of matrices meets LAPACK: see `decompositions.each_layer`."""

import cases
import jax
import jax.numpy as jnp
import pytest

import lora_jax as lora

PARAMS = {"layers": {"q_proj": cases.normal(0, 2, 8, 8), "k_proj": cases.normal(1, 2, 8, 8)}}
COVARIANCES = {f"layers/{name}": w @ w.mT for name, w in PARAMS["layers"].items()}
DECOMPOSES = ("cholesky", "eig", "geqrf", "householder", "lu", "qr", "svd", "triangular_solve")


def transformed(method, params=PARAMS):
    return lora.lora_transform(params, method, key=jax.random.key(0))


def corrected(delta):
    return lora.project_b().update(delta, None, delta)


def loftq(params):
    return lora.loftq_start(params, *transformed(LORA, lora.quantize(params, "nf4", block_size=8)))


LORA = lora.LoRA(rank=2)
DELTA = transformed(LORA)[1]
FUNCTIONS = {
    "pissa": (lambda p: transformed(lora.LoRA(rank=2, init="pissa"), p), PARAMS),
    "fast pissa": (lambda p: transformed(lora.LoRA(rank=2, init="pissa_niter_1"), p), PARAMS),
    "olora": (lambda p: transformed(lora.LoRA(rank=2, init="olora"), p), PARAMS),
    "lora-fa": (corrected, transformed(lora.LoRA(rank=2, train_a=False))[1]),
    "eva": (lambda c: lora.eva_start(DELTA, c), COVARIANCES),
    "input importance": (lambda c: lora.input_importance(c, rank=2), COVARIANCES),
    "gradient importance": (lambda g: lora.gradient_importance(g, rank=2), PARAMS),
    "combine": (lambda d: lora.combine([d, d], [0.5, 0.5], how="svd", rank=2), DELTA),
    "extract": (lambda p: lora.extract(PARAMS, p, LORA), PARAMS),
    "loftq": (loftq, PARAMS),
}


def decompositions(jaxpr):
    """The shapes that the program's decompositions take, also inside its loops and calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith(DECOMPOSES):
            yield equation.invars[0].aval.shape
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from decompositions(inner)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_decompositions_take_one_matrix_at_a_time(name):
    function, argument = FUNCTIONS[name]
    shapes = list(decompositions(jax.make_jaxpr(function)(argument).jaxpr))
    assert shapes and all(len(shape) == 2 for shape in shapes)


def test_a_batch_would_be_seen():
    batched = jax.make_jaxpr(jnp.linalg.svd)(PARAMS["layers"]["q_proj"]).jaxpr
    assert (2, 8, 8) in list(decompositions(batched))
