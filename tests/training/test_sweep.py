"""Arms that share a step end where their solo runs end."""

import jax
import pytest
import small

import lora_jax as lora
from lora_jax import training
from lora_jax.training.fit import mean_losses
from lora_jax.training.sweep import make_sweep, resolve_mode, same_shapes

ARMS = [
    (lora.LoRA(rank=1, alpha=4), "qv", 1e-2, 0),
    (lora.LoRA(rank=4, alpha=16, scaling="rslora"), "all-linear", 3e-2, 1),
]
STEPS = 4


def train(arms, mode):
    """Each arm's final delta, in its own shapes, its validation loss, and how often we compiled."""
    base, tx = small.params(), training.adamw(steps=STEPS, warmup_steps=1)
    traces = []

    def counted(delta, base, batch, key):
        traces.append(1)
        return small.LOSS(delta, base, batch, key)

    sweep = make_sweep(training.train_step(counted, tx), small.without_dropout, mode)
    solo = small.states(base, arms, tx)
    padded = same_shapes([state.delta for state in solo])
    packed = sweep.pack(
        [
            training.init_state(delta, tx, learning_rate=rate, seed=seed)
            for delta, (_, _, rate, seed) in zip(padded, arms, strict=True)
        ]
    )
    for i in range(STEPS):
        packed, _ = sweep.step(packed, base, small.batch(i), [True] * len(arms))
    losses = mean_losses(sweep, packed, base, [small.batch(100), small.batch(101)])
    deltas = [state.delta for state in sweep.unpack(packed)]
    trimmed = lora.unstack(lora.stack(deltas), like=[state.delta for state in solo])
    return trimmed, losses, len(traces)


@pytest.mark.parametrize("mode", [pytest.param("in_turn", marks=pytest.mark.slow), "batched"])
def test_every_arm_ends_where_its_solo_run_ends(mode):
    deltas, losses, compilations = train(ARMS, mode)
    assert compilations == 1
    for arm, delta, loss in zip(ARMS, deltas, losses, strict=True):
        [alone], [loss_alone], _ = train([arm], "in_turn")
        small.assert_close(delta, alone)
        assert loss == pytest.approx(loss_alone, rel=1e-5)


@pytest.mark.parametrize("mode", ["in_turn", "batched"])
def test_a_stopped_arm_keeps_its_state(mode):
    base, tx = small.params(), training.adamw(steps=3)
    sweep = make_sweep(training.train_step(small.LOSS, tx), small.without_dropout, mode)
    arms = [(lora.LoRA(rank=2), "qv", 1e-2, seed) for seed in range(2)]
    first = small.states(base, arms, tx)
    packed, _ = sweep.step(sweep.pack(first), base, small.batch(0), [False, True])
    kept, moved = sweep.unpack(packed)
    small.assert_equal(kept, first[0])
    assert int(moved.step) == 1


def test_auto_goes_in_turn_on_a_cpu():
    assert jax.default_backend() == "cpu" and resolve_mode("auto") == "in_turn"
    with pytest.raises(ValueError, match="expected one of auto, batched, in_turn"):
        resolve_mode("parallel")
