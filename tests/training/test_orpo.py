"""ORPO against its equations, written out over all logits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from pairs import pairs, start

import lora_jax as lora
from lora_jax import training
from lora_jax.models import llama
from lora_jax.training.preference import log_odds

BETA = 0.3
LOSS = training.orpo_loss(small.CONFIG, beta=BETA, chunk=8)
BATCH = pairs()


def plain(delta, base, batch):
    """Equations 4 to 7, pair by pair, and their mean."""
    length = batch["tokens"].shape[-1]
    tokens, losses = batch["tokens"].reshape(-1, length), []
    logits = llama.forward(lora.bind(base, delta), tokens, small.CONFIG)
    of_all = jax.nn.log_softmax(logits).reshape(-1, 2, length, small.CONFIG.vocab_size)
    for row in range(len(batch["tokens"])):
        log_p = []
        for which in range(2):
            counts = np.flatnonzero(batch["loss_mask"][row, which])
            log_probs = of_all[row, which][counts, batch["targets"][row, which][counts]]
            log_p.append(log_probs.mean() if len(counts) else None)
        if None not in log_p:
            chosen, rejected = (p / (1 - p) for p in map(jnp.exp, log_p))
            losses.append(-log_p[0] - BETA * jnp.log(jax.nn.sigmoid(jnp.log(chosen / rejected))))
    return sum(losses) / len(losses), len(losses)


def stepped(batch, **options):
    base, delta = start()
    tx = optax.sgd(0.1)
    step = jax.jit(training.train_step(LOSS, tx, **options))
    return step(training.init_state(delta, tx, seed=0), base, batch)


def test_value_and_gradient_are_those_of_the_equations():
    base, delta = start()
    gradients = jax.value_and_grad(lambda *trees: plain(*trees, BATCH), has_aux=True)
    (loss, count), grads = jax.jit(gradients)(delta, base)
    state, metrics = stepped(BATCH)
    assert (int(metrics.count), int(count)) == (3, 3)
    chex.assert_trees_all_close(metrics.loss, loss, rtol=1e-5)
    moves = lora.trainable_mask(delta)
    expected = jax.tree.map(lambda d, g, m: d - 0.1 * g if m else d, delta, grads, moves)
    chex.assert_trees_all_close(state.delta, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_micro_batches_give_the_whole_batch():
    """One of them holds two pairs, the other one and padding."""
    chex.assert_trees_all_close(stepped(BATCH), stepped(BATCH, accumulate=2), rtol=1e-4, atol=1e-6)


def test_what_does_not_count_changes_nothing():
    """Prompts' targets, padding, and a pair of which one answer is missing."""
    mask = BATCH["loss_mask"]
    other = BATCH | {"targets": np.where(mask, BATCH["targets"], 7)}
    base, delta = start()
    sums = jax.jit(lambda batch: LOSS(delta, base, batch, None))
    chex.assert_trees_all_equal(sums(BATCH), sums(other))
    less = mask.copy()
    less[0, 1] = False
    without = sums(BATCH | {"loss_mask": less})
    alone = sums({name: np.concatenate([x[3:], x[1:]]) for name, x in BATCH.items()})
    chex.assert_trees_all_close(without, alone, rtol=1e-6)
    assert int(without[1]) == 2 and int(LOSS.positions(BATCH)) == BATCH["segment_ids"].sum()
    nothing = sums(BATCH | {"loss_mask": np.zeros_like(mask)})
    assert [float(x) for x in nothing] == [0, 0]


def test_steps_lower_the_loss_and_prefer_the_chosen():
    base, tx = small.params(), training.adamw(steps=20)
    [state] = small.states(base, [(lora.LoRA(rank=4), "all-linear", 3e-2, 0)], tx)
    step = jax.jit(chex.assert_max_traces(lambda *a: training.train_step(LOSS, tx)(*a), n=1))
    losses = []
    for _ in range(12):
        state, metrics = step(state, base, BATCH)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.8 * losses[0]


def test_odds_of_what_is_certain():
    p = np.array([1e-6, 0.2, 0.5, 0.9])
    chex.assert_trees_all_close(log_odds(jnp.log(p)), jnp.log(p / (1 - p)), rtol=1e-4, atol=1e-6)
    value, slope = jax.value_and_grad(log_odds)(jnp.float32(0))
    assert np.isfinite([value, slope]).all() and value > 15


def test_a_beta_below_zero_is_refused():
    with pytest.raises(ValueError, match=r"orpo_loss\(beta=-0.1\): expected a number"):
        training.orpo_loss(small.CONFIG, beta=-0.1)
