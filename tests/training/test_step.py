"""One step: what moves, what accumulates, what is shared."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

import lora_jax as lora
from lora_jax import training


def test_loss_falls_and_only_a_and_b_move():
    base, tx = small.params(), training.adamw(steps=20)
    [state] = small.states(base, [(lora.LoRA(rank=4), "all-linear", 3e-2, 0)], tx)
    step = jax.jit(training.train_step(small.LOSS, tx))
    batch, losses, first = small.batch(0), [], state
    for _ in range(20):
        state, metrics = step(state, base, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.8 * losses[0]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.delta, first.delta)
    assert moved == lora.trainable_mask(state.delta)


@pytest.mark.slow
@pytest.mark.parametrize("method", [lora.LoRA(rank=2), lora.Full()])
def test_accumulated_gradients_are_the_whole_batch(method):
    """Also where the micro-batches count different numbers of tokens."""
    base, tx = small.params(), training.adamw(steps=5)
    [state] = small.states(base, [(method, "all-linear", 1e-2, 0)], tx)
    batch = small.batch(3)
    batch["loss_mask"][0] = False
    whole, whole_metrics = training.train_step(small.LOSS, tx)(state, base, batch)
    cut, cut_metrics = training.train_step(small.LOSS, tx, accumulate=2)(state, base, batch)
    small.assert_close(whole_metrics, cut_metrics)
    small.assert_close(whole.delta, cut.delta, 1e-4)


def test_accumulation_must_divide_the_batch():
    base, tx = small.params(), training.adamw(steps=5)
    [state] = small.states(base, [(lora.LoRA(rank=2), "qv", 1e-2, 0)], tx)
    with pytest.raises(ValueError, match="accumulate=3 does not divide the batch of 4 rows"):
        training.train_step(small.LOSS, tx, accumulate=3)(state, base, small.batch(0))


def test_the_clip_sees_the_trained_part_alone():
    """A frozen embedding's gradient, were it computed, would dwarf the rest."""
    base = small.params()
    _, delta = lora.lora_transform(base, lora.LoRA(rank=2), targets="qv", key=jax.random.key(0))
    tx = lora.mask_optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), delta)
    grads = jax.tree.map(
        lambda leaf, trains: jnp.full_like(leaf, 3.0 if trains else 1e6),
        delta,
        lora.trainable_mask(delta),
    )
    updates, _ = tx.update(grads, tx.init(delta), delta)
    np.testing.assert_allclose(optax.tree.norm(updates), 1.0, rtol=1e-5)


def test_adamw_is_optax_adamw():
    schedule = training.optimizers.unit_schedule("cosine", 10, 3)
    ours = training.adamw(
        steps=10, warmup_steps=3, clip_norm=0.5, weight_decay=0.1, learning_rate=0.02
    )
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(lambda count: 0.02 * schedule(count), weight_decay=0.1),
    )
    params = {"w": jnp.arange(6.0).reshape(2, 3)}
    ours_state, theirs_state, mine, other = ours.init(params), theirs.init(params), params, params
    for i in range(10):
        grads = {"w": jnp.sin(jnp.arange(6.0) + i).reshape(2, 3)}
        updates, ours_state = ours.update(grads, ours_state, mine)
        mine = optax.apply_updates(mine, updates)
        updates, theirs_state = theirs.update(grads, theirs_state, other)
        other = optax.apply_updates(other, updates)
    small.assert_close(mine, other, 1e-6)


def test_the_schedule_rises_then_falls_to_zero():
    schedule = training.optimizers.unit_schedule("cosine", 10, 4)
    values = [float(schedule(i)) for i in range(11)]
    np.testing.assert_allclose(values[:5], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    assert values[4:] == sorted(values[4:], reverse=True) and values[10] == 0


def test_bad_schedules_are_refused():
    with pytest.raises(ValueError, match="expected one of cosine, linear, constant"):
        training.adamw(steps=10, schedule="cosin")
    with pytest.raises(ValueError, match="warmup_steps=10 must be at least 0 and less than steps"):
        training.adamw(steps=10, warmup_steps=10)


@pytest.mark.slow
def test_a_step_runs_under_pmap():
    """The batch split over devices, the base on each: their sum is one device's gradient."""
    base = small.params()
    _, delta = lora.lora_transform(base, lora.LoRA(rank=2), key=jax.random.key(0))
    delta = jax.tree.map(lambda leaf: leaf + 0.01, delta)
    batch = small.batch(0)

    def gradient(delta, base, batch):
        def loss(delta):
            total, count = small.LOSS(delta, base, batch, None)
            return total / jax.lax.psum(count, "devices")

        return jax.lax.psum(jax.grad(loss)(delta), "devices")

    split = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), batch)
    devices = jax.devices()[:2]
    per_device = jax.pmap(gradient, axis_name="devices", in_axes=(None, None, 0), devices=devices)(
        delta, base, split
    )

    def whole(delta):
        total, count = small.LOSS(delta, base, batch, None)
        return total / count

    small.assert_close(jax.tree.map(lambda g: g[0], per_device), jax.grad(whole)(delta))
