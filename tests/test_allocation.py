"""Ranks spread over paths and layers, from gradients or from activations; EVA's start."""

import functools

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close

import lora_jax as lora
from lora_jax.models import llama

CONFIG, PARAMS, TOKENS = cases.llama_case()
TARGETS = ("q_proj", "down_proj")
KEY = jax.random.key(0)


def test_the_largest_components_are_taken_wherever_they_are():
    importance = {"a/q_proj": [[9.0, 3, 1], [8, 7, 6], [0, 0, 0]], "b": [5, 4, 0], "c": [2, 2]}
    rules = lora.allocate_ranks(importance, budget=6, method=lora.LoRA(alpha=3.0, dropout=0.1))
    assert rules == {
        "a/q_proj": lora.LoRA(rank=(1, 3, 0), alpha=3.0, dropout=0.1),
        "b": lora.LoRA(rank=2, alpha=3.0, dropout=0.1),
        "c": None,
    }


@functools.cache
def covariances():
    def loss(weights):
        return llama.forward(weights, TOKENS, CONFIG, remat="elementwise").mean()

    return jax.jit(lambda p: lora.input_covariances(loss, p, targets=TARGETS))(PARAMS)


def test_covariances_are_those_of_what_the_layers_read():
    """The queries' inputs of the first layer are normalised embeddings; down_proj's are not."""
    found = covariances()
    assert {path: c.shape for path, c in found.items()} == {
        "layers/attn/q_proj": (3, 16, 16), "layers/mlp/down_proj": (3, 24, 24)
    }  # fmt: skip
    x = PARAMS["embed"][TOKENS]
    x = llama.rms_norm(x, PARAMS["layers"]["attn_norm"][0], CONFIG)
    expected = np.cov(np.asarray(x).reshape(-1, 16).T, bias=True)
    assert_close(found["layers/attn/q_proj"][0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_eva_starts_with_principal_directions_and_changes_nothing():
    importance = lora.input_importance(covariances(), rank=4)
    assert all(np.all(np.diff(v) <= 0) and np.all(v.sum(-1) < 1) for v in importance.values())
    rules = lora.allocate_ranks(importance, budget=12)
    base, delta = lora.lora_transform(PARAMS, rules, key=KEY)
    started = lora.eva_start(delta, covariances())
    spent = 0
    for path, rule in rules.items():
        _, group, leaf = path.split("/")
        node = started["layers"][group][leaf]
        for layer, rank in enumerate(rule.rank):
            spent += rank
            a = np.asarray(node.a[layer])
            assert_close(a[:, :rank].T @ a[:, :rank], np.eye(rank), atol=1e-5)
            assert not np.any(a[:, rank:])
            largest = np.linalg.eigvalsh(covariances()[path][layer])[::-1][:rank]
            along = np.diag(a[:, :rank].T @ covariances()[path][layer] @ a[:, :rank])
            assert_close(along, largest, rtol=1e-3, atol=1e-4)
        assert not np.any(node.b)
    assert spent == 12


def test_gradient_importance_is_of_each_layers_gradient():
    gradients = {"layers": {"q_proj": cases.normal(1, 3, 6, 5)}, "out": cases.normal(2, 5, 4)}
    found = lora.gradient_importance(gradients, rank=3)
    assert set(found) == {"layers/q_proj", "out"}
    exact = np.linalg.svd(np.asarray(gradients["layers"]["q_proj"][1]), compute_uv=False)
    assert_close(found["layers/q_proj"][1], exact[:3] ** 2, rtol=1e-4)
    ranks = [r.rank for r in lora.allocate_ranks(found, budget=5).values() if r]
    assert sum(sum(r) if isinstance(r, tuple) else r for r in ranks) == 5


@pytest.mark.parametrize("budget", [0, 4])
def test_impossible_budget(budget):
    with pytest.raises(ValueError, match=f"budget={budget}: expected at least 1 and at most 3"):
        lora.allocate_ranks({"w": [3.0, 2.0, 1.0]}, budget=budget)


def test_more_stack_axes_than_one():
    with pytest.raises(ValueError, match=r"experts/up: importance has the shape \(2, 2, 3\)"):
        lora.allocate_ranks({"experts/up": np.ones((2, 2, 3))}, budget=2)


def test_eva_without_a_covariance():
    delta = lora.lora_transform(PARAMS, lora.LoRA(rank=2), targets="o_proj", key=KEY)[1]
    with pytest.raises(ValueError, match="layers/attn/o_proj: no covariance of its inputs"):
        lora.eva_start(delta, {})


def test_padded_ranks_survive_eva():
    case = cases.stacked()
    delta = lora.lora_transform(case.params, lora.LoRA(rank=(2, 0, 1)), key=KEY)[1]
    same = jnp.broadcast_to(jnp.eye(6), (3, 6, 6))
    node = lora.eva_start(delta, {"layers/q_proj": same})["layers"]["q_proj"]
    assert [int(np.any(a, axis=0).sum()) for a in np.asarray(node.a)] == [2, 0, 1]
    chex.assert_trees_all_equal(node.scale, delta["layers"]["q_proj"].scale)
