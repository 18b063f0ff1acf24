"""Losses of preferences against their equations over all logits."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import BATCH, BESIDE_REFERENCE, GIVEN, MAKERS, READ, batch_of, both, loss, packed, start

import lora_jax as lora
from lora_jax.training import preference
from lora_jax.training.losses.target_log_probs import sequences


def plain(name, delta, base, batch, reference):
    """The equation of `preference` on sequences from all logits: the mean over what counts."""
    policy, theirs = (both(lora.bind(base, d), batch) for d in (delta, reference))
    if name == "kto":
        baseline = preference.kto_baseline(policy.rejected, theirs.rejected)
        good = batch["desirable"][:, 0]
        losses = preference.kto(policy.chosen, theirs.chosen, good, baseline, **GIVEN[name])
        counted = policy.chosen.lengths > 0
    else:
        beside = (policy, theirs) if name in BESIDE_REFERENCE else (policy,)
        losses = getattr(preference, name)(*beside, **GIVEN[name])
        counted = (policy.chosen.lengths > 0) & (policy.rejected.lengths > 0)
    return jnp.where(counted, losses, 0).sum() / counted.sum()


def mean(of, delta, base, batch, **settings):
    total, count = of(delta, base, batch, None, **settings)
    return total / count


@functools.cache
def found(name, references):
    """Values and gradients of one loss by one program: the equation's, ours, ours packed, and, if
    so wanted, ours with a reference of each sort."""
    base, delta = start()
    other = start(shift=-0.01)[1]
    batch = batch_of(name)
    every = {"plain": functools.partial(plain, name, reference={}), "ours": None}
    ours = functools.partial(mean, loss(name))
    every["ours"] = ours
    if references:
        stored = functools.partial(mean, loss(name, stored_reference=True))

        def kept(delta, base, batch, reference):
            log_probs = jax.lax.stop_gradient(READ(lora.bind(base, reference), batch))
            return stored(delta, base, batch | {"reference_log_probs": log_probs})

        every |= {
            "stored": functools.partial(kept, reference={}),
            "other plain": functools.partial(plain, name, reference=other),
            "other": functools.partial(ours, reference=other),
            "other stored": functools.partial(kept, reference=other),
        }

    @jax.jit
    def all_of_them(delta, base, batch, in_one_row):
        values = {key: jax.value_and_grad(fn)(delta, base, batch) for key, fn in every.items()}
        if name != "kto" and not references:
            values["packed"] = jax.value_and_grad(ours)(delta, base, in_one_row)
        return values

    row = packed(BATCH, 40) if name != "kto" else BATCH
    return all_of_them(delta, base, batch, row), delta


def agree(name, references):
    values, delta = found(name, references)
    moves = lora.trainable_mask(delta)
    for key, (value, grads) in values.items():
        expected, slopes = values["other plain" if "other" in key else "plain"]
        chex.assert_trees_all_close(value, expected, rtol=2e-5)
        masked = [
            jax.tree.map(lambda g, m: g if m else jnp.zeros_like(g), tree, moves)
            for tree in (grads, slopes)
        ]
        chex.assert_trees_all_close(*masked, rtol=2e-4, atol=2e-6)
    return values


@pytest.mark.parametrize("name", MAKERS)
def test_values_and_gradients_are_those_of_the_equations(name):
    """Also of pairs that are packed into one row."""
    agree(name, references=False)


@pytest.mark.parametrize(
    "name", [n if n == "dpo" else pytest.param(n, marks=pytest.mark.slow) for n in BESIDE_REFERENCE]
)
def test_the_reference_is_the_base_or_an_adapter_or_stored(name):
    """All with the same numbers."""
    values = agree(name, references=True)
    assert abs(values["other"][0] - values["ours"][0]) > 1e-4


def test_equations_by_hand():
    """Of one pair, with numbers that a reader can check."""
    policy, reference = (
        preference.Pairs(*(preference.Sequences(jnp.float32(x), jnp.int32(n)) for x, n in both))
        for both in ([(-4.0, 2), (-9.0, 3)], [(-5.0, 2), (-7.0, 3)])
    )
    log_sigmoid = lambda x: -np.log1p(np.exp(-x))  # noqa: E731
    margin, means = (-4 + 5) - (-9 + 7), (-4 + 5) / 2 - (-9 + 7) / 3
    expected = {
        "dpo": -0.9 * log_sigmoid(0.5 * margin) - 0.1 * log_sigmoid(-0.5 * margin),
        "dpo_norm": -log_sigmoid(0.5 * means),
        "ipo": (means - 1 / (2 * 0.5)) ** 2,
        "simpo": -log_sigmoid(0.5 * (-2 + 3) - 0.3),
        "reward": 0.5 * (-4 + 5),
        "desirable": 2 * (1 - np.exp(log_sigmoid(0.5 * (1 - 0.25)))),
        "undesirable": 3 * (1 - np.exp(log_sigmoid(0.5 * (0.25 - 1)))),
        "baseline": 0.0,
    }
    kto = functools.partial(preference.kto, policy.chosen, reference.chosen,
                            beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)  # fmt: skip
    ours = {
        "dpo": preference.dpo(policy, reference, beta=0.5, label_smoothing=0.1),
        "dpo_norm": preference.dpo_norm(policy, reference, beta=0.5),
        "ipo": preference.ipo(policy, reference, beta=0.5),
        "simpo": preference.simpo(policy, beta=0.5, gamma=0.3),
        "reward": preference.rewards(policy.chosen, reference.chosen, beta=0.5),
        "desirable": kto(True, 0.25),
        "undesirable": kto(False, 0.25),
        "baseline": preference.kto_baseline(policy.rejected, reference.rejected),
    }
    chex.assert_trees_all_close(ours, {k: np.float32(v) for k, v in expected.items()}, rtol=1e-5)


def test_sequences_are_the_segments_of_a_row():
    row = packed(BATCH, 40)
    values = np.where(row["loss_mask"], np.arange(80, dtype=np.float32).reshape(1, 2, 40), 0)
    found = sequences(values, row)
    assert found.lengths.shape == (1, 2, 40)
    for slot in range(2):
        for i in range(3):
            mine = row["segment_ids"][0, slot] == i + 1
            assert found.log_probs[0, slot, i] == values[0, slot][mine].sum()
            assert found.lengths[0, slot, i] == row["loss_mask"][0, slot][mine].sum()
    assert not found.lengths[..., 3:].any()
