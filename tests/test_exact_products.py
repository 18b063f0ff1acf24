"""Products that a user takes for exact are in float32 and ask for the highest precision, whatever
the platform's default is: TF32 on a GPU, bfloat16 on a TPU. A model's own products follow it."""

import functools

import cases
import jax
import jax.numpy as jnp
import jaxprs
import pytest
from cases import REGISTRY, moved

import lora_jax as lora
from lora_jax.methods import Method
from lora_jax.models import llama
from lora_jax.models.rotation import random_rotation, rotated
from lora_jax.transform import delta_nodes

HIGHEST = (jax.lax.Precision.HIGHEST,) * 2
KEY = jax.random.key(0)
PARAMS = {"embed": cases.normal(0, 64, 32), "layers": {"k_proj": cases.normal(1, 2, 32, 6)}}
BASES = {
    "float32": PARAMS,
    "bfloat16": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS),
    **{
        format: lora.quantize(PARAMS, format, targets=".*", **cases.format_options(format, 8))
        for format in cases.STORAGES
    },
}
METHODS = {kind.__name__: (entry.method, entry.targets) for kind, entry in REGISTRY.items()} | {
    init: (lora.LoRA(rank=2, init=init), "k_proj") for init in ("pissa", "pissa_niter_2", "olora")
} | {"encoded prefix": (lora.Prefix(length=2, hidden=3), "k_proj")}  # fmt: skip
# What makes an update, or keys and values, of factors.
MULTIPLIES = {"LoHa", "LoRA", "DoRA", "VeRA", "AdaLoRA", "pissa", "pissa_niter_2", "olora"}


def products(function, *arguments):
    """Those of a function, every one of which is exact."""
    found = jaxprs.of("dot_general", function, *arguments)
    for eqn in found:
        assert eqn.params["precision"] == HIGHEST, eqn
        assert {var.aval.dtype for var in eqn.invars} == {jnp.dtype("float32")}, eqn
    return found


@functools.cache
def made(name, base="float32"):
    """A method, its targets and a delta of it after some training."""
    method, targets = METHODS[name]
    method = method if isinstance(method, Method) else method(PARAMS)
    given = {"targets": targets, "key": KEY}
    return method, given, moved(lora.lora_transform(BASES[base], method, **given)[1])


@pytest.mark.sampled
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", METHODS)
def test_of_a_method(name, base):
    method, given, delta = made(name, base)
    init = products(lambda tree: lora.lora_transform(tree, method, **given), BASES[base])
    assert bool(init) == (name in ("pissa_niter_2", "olora"))
    bound = products(lora.bind, BASES[base], delta)
    assert len(bound) == (2 if name == "encoded prefix" else 0)
    kinds = {type(node).__name__ for node in delta_nodes(delta).values()}
    if kinds & {"BottleneckNode", "FusionNode", "PromptNode", "PrefixNode", "EncodedPrefixNode"}:
        return
    merged = products(lora.merge, BASES[base], delta)
    assert bool(merged) == (name in MULTIPLIES)
    if base in cases.STORAGES:
        again = products(functools.partial(lora.merge, requantize=True), BASES[base], delta)
        assert len(again) == len(merged)
    else:
        assert bool(products(lora.unmerge, BASES[base], delta)) == bool(merged)
    slope = jax.grad(lambda d: sum(map(jnp.sum, jax.tree.leaves(lora.merge(PARAMS, d)))))
    assert len(products(slope, delta)) >= len(merged)


@pytest.mark.parametrize("how", ["cat", "svd", "ties", "dare", "dare_ties"])
def test_of_a_combination(how):
    options = {} if how in ("cat", "svd") else {"density": 0.5}
    if how.startswith("dare"):
        options["key"] = KEY
    deltas = [made("LoRA")[2], moved(made("LoRA")[2], seed=2)]
    for rank in [None] if how == "cat" else [None, 1]:
        combine = functools.partial(lora.combine, how=how, rank=rank, **options)
        assert bool(products(lambda *d, combine=combine: combine(d, [0.5, 2.0]), *deltas)) == (
            how != "cat"
        )


def test_of_what_is_extracted_and_initialised_from_data():
    delta, gram = made("LoRA")[2], {"layers/k_proj": jnp.stack([jnp.eye(32)] * 2)}
    products(lambda *trees: lora.extract(*trees, lora.LoRA(rank=2)), PARAMS, PARAMS)
    products(lora.eva_start, delta, gram)
    products(functools.partial(lora.input_importance, rank=2), gram)
    products(functools.partial(lora.gradient_importance, rank=2), PARAMS)
    products(lora.as_plain_lora, made("pissa")[2])
    loftq = functools.partial(lora.loftq_start, iterations=2)
    assert products(loftq, PARAMS, BASES["nf4"], delta)
    assert products(lora.orthogonality, made("AdaLoRA")[2])
    products(lora.allocate_budget, *[made("AdaLoRA")[2]] * 2, jnp.int32(1))
    frozen = lora.lora_transform(PARAMS, lora.LoRA(rank=2, train_a=False), key=KEY)[1]
    correct = lora.project_b()
    assert products(lambda d: correct.update(d, correct.init(d), d), frozen)


def test_of_covariances_though_not_of_the_loss():
    def loss(weights):
        return jnp.sum(lora.linear(cases.X[:, :5], weights["q_proj"]))

    covariances = functools.partial(lora.input_covariances, loss)
    found = jaxprs.of("dot_general", covariances, {"q_proj": cases.normal(0, 5, 4)})
    sums = [eqn for eqn in found if eqn.outvars[0].aval.shape == (6, 6)]
    assert [eqn.params["precision"] for eqn in sums] == [HIGHEST]


def test_of_a_rotation():
    config, params, _ = cases.llama_case()
    products(lambda key: random_rotation(config.hidden_size, key=key), KEY)
    assert products(rotated, params, jnp.eye(config.hidden_size))


@pytest.mark.parametrize("tree", ["float32", *cases.STORAGES])
def test_of_the_norm_that_dora_divides_by(tree):
    """In the model too, where the other products are at the platform's default."""
    delta = made("DoRA", tree)[2]

    def run(delta, x):
        weights = lora.bind(BASES[tree], delta)["layers"]["k_proj"]
        return lora.linear(x, jax.tree.map(lambda leaf: leaf[0], weights))

    found = jaxprs.of("dot_general", run, delta, jnp.ones((5, 32)))
    rank, rows = 2, 5
    for eqn in found:
        if rows not in eqn.outvars[0].aval.shape:
            assert eqn.params["precision"] == HIGHEST, eqn
    assert sum(rank in eqn.outvars[0].aval.shape for eqn in found) >= 3


def test_a_models_own_products_follow_the_default():
    config, params, tokens = cases.llama_case()
    forward = functools.partial(llama.forward, config=config)
    given = {None: None, "highest": HIGHEST, "bfloat16": (jax.lax.Precision.DEFAULT,) * 2}
    for name, expected in given.items():
        with jax.default_matmul_precision(name):
            found = jaxprs.of("dot_general", forward, params, tokens)
        assert {eqn.params["precision"] for eqn in found} == {expected}
