"""The loop: checkpoints, resumption, early stopping, divergence."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import small

import lora_jax as lora
from lora_jax import training
from lora_jax.training.fit import Schedule, fit
from lora_jax.training.step import StepMetrics
from lora_jax.training.sweep import Sweep, make_sweep, same_shapes

SCHEDULE = Schedule(steps=6, eval_every=2, checkpoint_every=2)
ARMS = {"small": (lora.LoRA(rank=1), "qv", 1e-2, 0), "large": (lora.LoRA(rank=4), "qv", 1e-2, 1)}


class Killed(Exception):  # noqa: N818
    """Stands for `kill -9`: nothing after it runs."""


def run(folder, *, arms=ARMS, schedule=SCHEDULE, base=None, kill_at=None, identity=None, log=None):
    base = small.params() if base is None else base
    tx = training.adamw(steps=schedule.steps)
    specs = list(arms.values())
    padded = same_shapes([state.delta for state in small.states(base, specs, tx)])
    states = [
        training.init_state(delta, tx, learning_rate=rate, seed=seed)
        for delta, (_, _, rate, seed) in zip(padded, specs, strict=True)
    ]
    records = []

    def keep(record):
        records.append(record)
        if kill_at is not None and record.get("step") == kill_at and "loss" in record:
            raise Killed
        if log:
            log(record)

    sweep = make_sweep(training.train_step(small.LOSS, tx), small.without_dropout, "in_turn")
    states, progress = fit(
        sweep,
        states,
        base,
        arms=list(arms),
        batches=small.Batches(),
        validation=[small.batch(100)],
        schedule=schedule,
        folder=folder,
        identity=identity or {"base": "b"},
        log=keep,
    )
    return states, progress, records


@pytest.mark.parametrize(
    "kill_at", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(6, marks=pytest.mark.slow)]
)
def test_a_killed_run_ends_bit_for_bit_where_it_would_have(tmp_path, kill_at):
    states, progress, _ = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill_at=kill_at)
    again, reached, records = run(tmp_path / "killed")
    assert records[0]["step"] == (kill_at - 1) // 2 * 2
    small.assert_equal(again, states)
    for ours, theirs in zip(reached, progress, strict=True):
        assert dataclasses.replace(ours, seconds=0) == dataclasses.replace(theirs, seconds=0)


def test_a_finished_run_trains_no_further(tmp_path):
    states, progress, _ = run(tmp_path)
    again, reached, records = run(tmp_path)
    small.assert_equal(again, states)
    assert reached == progress and not any("loss" in record for record in records)


def test_checkpoints_of_others_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="base is b there and other here"):
        run(tmp_path, identity={"base": "other"})
    with pytest.raises(ValueError, match=r"arms is \['small', 'large'\] there"):
        run(tmp_path, arms={"small": ARMS["small"], "huge": ARMS["large"]})
    other_method = {name: (lora.Full(), "qv", 1e-2, 0) for name in ARMS}
    with pytest.raises(ValueError, match=r"delta/layers/attn/.* is .* there and .* here"):
        run(tmp_path, arms=other_method)


def test_a_damaged_checkpoint_is_named(tmp_path):
    run(tmp_path)
    for file in (tmp_path / "6").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"/6 is damaged .*Delete that folder"):
        run(tmp_path)


def test_an_arm_that_stops_improving_stops(tmp_path):
    """At a rate of zero nothing improves: one best, then patience runs out."""
    arms = {"still": (lora.LoRA(rank=1), "qv", 0.0, 0)}
    schedule = dataclasses.replace(SCHEDULE, steps=20, patience=2)
    states, progress, records = run(tmp_path, arms=arms, schedule=schedule)
    assert progress[0].stopped == "early" and int(states[0].step) == 6
    assert {"event": "stopped early", "arm": "still", "step": 6} in records
    again, reached, _ = run(tmp_path, arms=arms, schedule=schedule)
    small.assert_equal(again, states)
    assert reached == progress


def test_an_arm_that_diverges_stops_alone(tmp_path):
    arms = {"wild": (lora.LoRA(rank=1), "qv", float("inf"), 0), "tame": ARMS["large"]}
    _, progress, records = run(tmp_path, arms=arms)
    assert [arm.stopped for arm in progress] == ["diverged", None]
    assert any(record.get("event") == "diverged" for record in records)
    assert progress[1].val_loss is not None


def test_a_run_that_diverges_says_so(tmp_path):
    base = small.params()
    base["norm"] = base["norm"] * jnp.nan
    with pytest.raises(ValueError, match=r"not a number any more at step 1\. Lower the learning"):
        run(tmp_path, base=base)


def test_the_loop_waits_for_the_device_only_to_log(tmp_path):
    """Steps 1 to 3 are handed to the device before anything of them is read, and 4 to 6 too."""
    events = []

    class OnTheWay:
        """A number of a step that notes when it is waited for."""

        def __array__(self, dtype=None, copy=None):
            events.append("wait")
            return np.ones(1)

    def step(packed, base, batch, running):
        events.append("step")
        return packed, StepMetrics(OnTheWay(), OnTheWay())

    state = {"delta": jnp.ones(3)}
    sweep = Sweep(lambda states: states[0], lambda packed: [packed], step,
                  lambda *_: (np.ones(1), np.ones(1)))  # fmt: skip
    schedule = Schedule(steps=6, eval_every=100, checkpoint_every=100, log_every=3)
    fit(
        sweep, [state], None, arms=["one"], batches=small.Batches(), validation=[None],
        schedule=schedule, folder=tmp_path, identity={}, log=lambda record: None,
    )  # fmt: skip
    assert events == 2 * (3 * ["step"] + 6 * ["wait"])
