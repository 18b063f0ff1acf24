"""AdaLoRA: its formula, its penalty, and how its budget is spent."""

import functools

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_close, moved

import lora_jax as lora
from lora_jax import training

METHOD = lora.AdaLoRA(rank=4, target_rank=1, total_steps=12, warmup=2, final=3, interval=2,
                      alpha=8.0, penalty=0.3)  # fmt: skip
PARAMS = {"layers": {"q_proj": cases.normal(0, 3, 6, 6)}, "out": cases.normal(1, 6, 6)}
TARGETS = ("q_proj", "out")
KEY = jax.random.key(0)
ALLOCATE = jax.jit(lora.allocate_budget)


def made(method=METHOD, targets=TARGETS):
    rules = tuple(method.items()) if isinstance(method, dict) else method
    return PARAMS, dict(fresh(rules, targets))


@functools.cache
def fresh(rules, targets):
    method = dict(rules) if isinstance(rules, tuple) else rules
    make = jax.jit(lambda p: lora.lora_transform(p, method, key=KEY, targets=targets)[1])
    return make(PARAMS)


def test_formula():
    base, delta = made()
    delta = moved(delta)
    node, x = delta["out"], cases.normal(2, 3, 6)
    update = 8 / (4 + 1e-5) * node.a @ jnp.diag(node.e) @ node.b
    assert_close(lora.linear(x, lora.bind(base, delta)["out"]), x @ (PARAMS["out"] + update),
                 atol=5e-6)  # fmt: skip


def test_draws():
    node = made()[1]["layers"]["q_proj"]
    assert not np.any(node.e) and 0.01 < np.std(node.a) < 0.03 and 0.01 < np.std(node.b) < 0.03


def test_penalty_is_the_mean_distance_from_orthogonality():
    delta = moved(made()[1])
    distances = []
    nodes = jax.tree.map(np.asarray, delta)
    for node in nodes["layers"]["q_proj"], jax.tree.map(lambda x: x[None], nodes["out"]):
        for a, b in zip(node.a, node.b, strict=True):
            distances += [np.linalg.norm(a.T @ a - np.eye(4)), np.linalg.norm(b @ b.T - np.eye(4))]
    assert len(distances) == 8
    assert_close(jax.jit(lora.orthogonality)(delta), 0.3 * np.mean(distances))
    others = {"layers": made(lora.LoRA(rank=2), targets="q_proj")[1]["layers"]}
    assert lora.orthogonality(others) == 0
    orthogonal = made()[1]["out"].replace(a=jnp.eye(6, 4), b=jnp.eye(4, 6))
    slope = jax.jit(jax.grad(lora.orthogonality))({"out": orthogonal})
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))


def trained(delta, steps):
    """Ranks after each step of a descent on random gradients; compiled once."""
    counts = []

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(delta, grads, number):
        delta = jax.tree.map(
            lambda d, g, trains: d - 0.1 * g if trains else d,
            delta, grads, lora.trainable_mask(delta),
        )  # fmt: skip
        return lora.allocate_budget(delta, grads, number)

    for i in range(steps):
        grads = moved(delta, seed=i + 1, size=1.0)
        delta = step(delta, grads, i + 1)
        nodes = delta["layers"]["q_proj"], delta["out"]
        counts.append([sum(int(np.count_nonzero(getattr(node, name))) for node in nodes)
                       for name in ("mask", "e")])  # fmt: skip
    return delta, counts


def test_budget_falls_by_the_cubic_schedule():
    _, counts = trained(made()[1], 12)
    full, target = 4 * 4, 1 * 4
    budget = {t: int((full - target) * (1 - (t - 2) / 7) ** 3 + target) for t in (4, 6, 8, 9)}
    ranks = [16] * 3 + [budget[4]] * 2 + [budget[6]] * 2 + [budget[8]] + [budget[9]] * 4
    assert [mask for mask, _ in counts] == ranks and ranks[-1] == 4
    # Zeroed values may grow again until the next allocation, and no more after the last.
    assert [values for _, values in counts] == [16] * 3 + [
        budget[4], 16, budget[6], 16, budget[8], 4, 4, 4, 4
    ]  # fmt: skip


def test_the_least_important_go_first_wherever_they_are():
    delta = moved(made()[1])
    delta["out"] = jax.tree.map(lambda x: 1e-3 * x, delta["out"])
    grads = moved(delta, seed=3)
    after = ALLOCATE(delta, grads, 4)
    assert not np.any(after["out"].mask)
    assert np.count_nonzero(after["layers"]["q_proj"].mask) == 8


def test_stacked_layers_are_so_many_matrices():
    """Which share one budget with all others."""
    delta = moved(made()[1])
    grads = moved(delta, seed=3)

    def unstacked(tree):
        layers = tree["layers"]["q_proj"]
        return {"out": tree["out"]} | {
            str(i): jax.tree.map(lambda x: x[i], layers)  # noqa: B023
            for i in range(3)
        }

    after = ALLOCATE(delta, grads, 4)
    flat = ALLOCATE(unstacked(delta), unstacked(grads), 4)
    assert_close(unstacked(after), flat)


def test_other_methods_are_left_alone():
    rules = {"q_proj": lora.LoRA(rank=2), "out": METHOD}
    delta = moved(made(rules, targets="all-linear")[1])
    after = lora.allocate_budget(delta, delta, 4)
    assert after["layers"]["q_proj"] is delta["layers"]["q_proj"]
    assert np.count_nonzero(after["out"].mask) < 4


@pytest.mark.mixed_dtypes
def test_a_training_step_penalises_and_allocates():
    base, delta = made()
    tx = optax.sgd(0.1)

    def loss_sum(delta, base, batch, key):
        weights = lora.bind(base, delta)
        return (lora.linear(batch, weights["out"]) ** 2).sum(), jnp.float32(batch.size)

    step = jax.jit(training.train_step(loss_sum, tx))
    state = training.init_state(moved(delta), tx, seed=0)
    before = lora.orthogonality({"layers": state.delta["layers"]})
    for _ in range(12):
        state, _ = step(state, base, cases.normal(5, 2, 6))
    layers = {"layers": state.delta["layers"]}  # no part of the loss but for the penalty
    assert lora.orthogonality(layers) < before
    assert np.count_nonzero(state.delta["layers"]["q_proj"].e) + np.count_nonzero(
        state.delta["out"].e) <= 4  # fmt: skip


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "needs total_steps"),
        ({"total_steps": 10, "warmup": 6, "final": 4}, "leaves no step to allocate in"),
        ({"total_steps": 10, "rank": 4, "target_rank": 5}, "target_rank=5.*at most the rank, 4"),
        ({"total_steps": 10, "penalty": -1.0}, "penalty of at least 0"),
        ({"total_steps": 10, "interval": 0}, "interval of at least 1"),
    ],
)
def test_bad_hyperparameters(kwargs, message):
    with pytest.raises(ValueError, match=message):
        lora.AdaLoRA(**kwargs)


def test_rank_above_the_smaller_side():
    with pytest.raises(ValueError, match=r"out: AdaLoRA\(rank=12\) exceeds .* 6 x 6"):
        made(lora.AdaLoRA(total_steps=9), targets="out")
