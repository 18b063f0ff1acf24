"""A mean over a count is defined where nothing counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

import lora_jax as lora
from lora_jax import training
from lora_jax.training.fit import mean_losses
from lora_jax.training.sweep import make_sweep

BASE = {"w": np.eye(4, 3, dtype=np.float32)}
METHODS = {
    "LoRA": lora.LoRA(rank=2),
    "AdaLoRA": lora.AdaLoRA(rank=2, target_rank=1, total_steps=20),
    "Full": lora.Full(),
}


def batch(*counts):
    """Four rows of features; each has so many counted units."""
    x = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    return {"x": x, "count": np.asarray(counts, np.float32)}


def loss_sum(delta, base, batch, key=None):
    """A mean of its own, as users write it: not a number where nothing counts, nor its gradient."""
    y = lora.linear(batch["x"], lora.bind(base, delta)["w"])
    count = batch["count"].sum()
    mean = (((y - 1) ** 2).sum(-1) * batch["count"]).sum() / count
    return mean * count, count


def state_of(method, tx):
    _, delta = lora.lora_transform(BASE, METHODS[method], targets=".*", key=jax.random.key(0))
    return training.init_state(delta, tx, learning_rate=1e-2, seed=0)


@pytest.mark.sampled
@pytest.mark.parametrize("name", training.optimizers.DIRECTIONS)
def test_a_batch_without_a_counted_unit_is_a_step_of_zero_gradient(name):
    tx = training.optimizer(name, steps=9, schedule="constant")
    first = state_of("LoRA", tx)
    step = jax.jit(training.train_step(loss_sum, tx))
    moved, metrics = step(first, BASE, batch(0, 0, 0, 0))
    assert (float(metrics.loss), float(metrics.grad_norm), float(metrics.count)) == (0, 0, 0)
    small.assert_equal(moved.delta, first.delta)
    again, metrics = step(moved, BASE, batch(1, 0, 2, 0))  # and goes on as if it had not been
    assert np.isfinite(metrics.loss) and metrics.grad_norm > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(again.delta))


@pytest.mark.sampled
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("counts", [(0, 0, 3, 1), (2, 1, 0, 0), (0, 0, 0, 0)])
def test_micro_batches_and_devices_weigh_as_they_count(method, counts):
    tx = training.optimizer("sgd", steps=9, schedule="constant")
    first = state_of(method, tx)
    whole, metrics = jax.jit(training.train_step(loss_sum, tx))(first, BASE, batch(*counts))
    cut, cut_metrics = jax.jit(training.train_step(loss_sum, tx, accumulate=2))(
        first, BASE, batch(*counts)
    )
    split = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), batch(*counts))
    pod = jax.pmap(
        training.train_step(loss_sum, tx, axis_name="devices"),
        "devices",
        in_axes=(None, None, 0),
        out_axes=None,
        devices=jax.devices()[:2],
    )
    spread, spread_metrics = pod(first, BASE, split)
    small.assert_close((whole, metrics), (cut, cut_metrics), 1e-6)
    small.assert_close((whole, metrics), jax.device_get((spread, spread_metrics)), 1e-6)


@pytest.mark.parametrize("mode", ["in_turn", "batched"])
def test_validation_without_a_counted_unit(mode):
    tx = training.adamw(steps=9)

    def evaluate(delta, base, batch):
        total, count = loss_sum(delta, base, batch)
        return jnp.where(count > 0, total, 0), count

    sweep = make_sweep(training.train_step(loss_sum, tx), evaluate, mode)
    packed = sweep.pack([state_of("LoRA", tx), state_of("LoRA", tx)])
    empty, counted = batch(0, 0, 0, 0), batch(1, 1, 0, 0)
    assert mean_losses(sweep, packed, BASE, [empty]) == [0.0, 0.0]
    both = mean_losses(sweep, packed, BASE, [empty, counted])
    assert both == mean_losses(sweep, packed, BASE, [counted])


def test_a_llama_s_loss_of_nothing():
    base, tx = small.params(), training.adamw(steps=5)
    [state] = small.states(base, [(lora.LoRA(rank=2), "qv", 1e-2, 0)], tx)
    nothing = small.batch(0)
    nothing["loss_mask"][:], nothing["segment_ids"][:] = False, 0
    moved, metrics = jax.jit(training.train_step(small.LOSS, tx))(state, base, nothing)
    assert float(metrics.loss) == 0 and float(metrics.grad_norm) == 0
    small.assert_equal(moved.delta, state.delta)
