"""The loop: checkpoints, resumption, early stopping, divergence."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import small

import lora_jax as lora
from lora_jax import training
from lora_jax.training.fit import Preempted, Schedule, fit
from lora_jax.training.step import StepMetrics
from lora_jax.training.sweep import Sweep, make_sweep

MORE = [pytest.param(*c, marks=pytest.mark.slow) for c in (("in_turn", True), ("batched", False))]
SCHEDULE = Schedule(steps=6, eval_every=2, checkpoint_every=2)
ARMS = {"small": (lora.LoRA(rank=1), "qv", 1e-2, 0), "large": (lora.LoRA(rank=4), "qv", 1e-2, 1)}


class Killed(Exception):  # noqa: N818
    """Stands for `kill -9`: nothing after it runs."""


def run(
    folder,
    *,
    arms=ARMS,
    schedule=SCHEDULE,
    base=None,
    kill_at=None,
    identity=None,
    log=None,
    stop_requested=lambda: False,
    mode="in_turn",
    batches=None,
    validation=None,
    steps=None,
    learn="cosine",
    positions=small.LOSS.positions,
    give_up=None,
):
    base = small.params() if base is None else base
    tx = training.adamw(steps=steps or schedule.steps, schedule=learn)
    states = small.states(base, list(arms.values()), tx)
    records = []

    def keep(record):
        records.append(record)
        if kill_at is not None and record.get("step") == kill_at and "loss" in record:
            raise Killed
        if log:
            log(record)

    sweep = make_sweep(training.train_step(small.LOSS, tx), small.without_dropout, mode)
    states, progress = fit(
        sweep,
        states,
        base,
        arms=list(arms),
        batches=batches or small.Batches(),
        validation=[validation or small.batch(100)],
        schedule=schedule,
        folder=folder,
        identity=identity or {"base": "b"},
        log=keep,
        positions=positions,
        stop_requested=stop_requested,
        give_up=give_up,
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


@pytest.mark.slow
def test_a_run_asked_to_end_saves_and_ends_bit_for_bit_where_it_would_have(tmp_path):
    states, _, _ = run(tmp_path / "whole")
    asked = iter([False, False, True])
    with pytest.raises(Preempted, match="after step 3 of 6, which is saved"):
        run(tmp_path / "asked", stop_requested=lambda: next(asked))
    again, _, records = run(tmp_path / "asked")
    assert records[0]["step"] == 3
    small.assert_equal(again, states)


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


@dataclasses.dataclass
class OtherBatches(small.Batches):
    """The same iterator over other data."""

    def __next__(self):
        self.next_seed += 1
        return small.batch(1000 + self.next_seed)


def test_other_data_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="first batch is .* there and .* here, validation batches"):
        run(tmp_path, batches=OtherBatches(), validation=small.batch(101))
    with pytest.raises(ValueError, match="data.seed is None there and 3 here"):
        run(tmp_path, identity={"base": "b", "data.seed": 3})


def changed(**settings):
    """The arms with another method, rate or seed of the first."""
    method, targets, rate, seed = ARMS["small"]
    new = {"method": method, "rate": rate, "seed": seed, **settings}
    return {**ARMS, "small": (new["method"], targets, new["rate"], new["seed"])}


@pytest.mark.parametrize("mode", ["in_turn", pytest.param("batched", marks=pytest.mark.slow)])
def test_what_a_caller_changed_holds_or_is_refused(tmp_path, mode):
    """A learning rate holds; what the restored delta or its dropout would ignore is refused."""
    short = dataclasses.replace(SCHEDULE, steps=2)
    run(tmp_path, schedule=short, mode=mode, steps=6)
    for arms in (
        changed(seed=7),
        changed(method=lora.LoRA(rank=1, alpha=4)),
    ):
        with pytest.raises(
            ValueError, match=r"arm 'small' was begun with other settings there, as"
        ):
            run(tmp_path, arms=arms, mode=mode)
    frozen, _, _ = run(tmp_path, arms=changed(rate=0.0), mode=mode)
    kept, _, _ = run(tmp_path / "alone", schedule=short, mode=mode, steps=6)
    small.assert_equal(frozen[0].delta, kept[0].delta)
    assert np.any(frozen[1].delta["layers"]["attn"]["q_proj"].b != kept[1].delta["layers"]["attn"][
        "q_proj"].b)  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "same"),
    [
        ("in_turn", False),
        pytest.param("batched", True, marks=pytest.mark.slow),
        *MORE,
    ],
)
def test_early_stopping_keeps_the_best(tmp_path, mode, same):
    """At a rate at which the loss first falls and then rises; resumed bit for bit."""
    rank = 4 if same else 1
    arms = {
        "wild": (lora.LoRA(rank=4), "qv", 0.5, 0),
        "tame": (lora.LoRA(rank=rank), "qv", 1e-3, 1),
    }
    schedule = Schedule(steps=8, eval_every=1, checkpoint_every=1, patience=3)
    states, progress, records = run(
        tmp_path / "whole", arms=arms, schedule=schedule, mode=mode, learn="constant"
    )
    for name, state, arm in zip(arms, states, progress, strict=True):
        losses = {
            r["step"]: r["val_loss"] for r in records if r.get("arm") == name and "val_loss" in r
        }
        assert arm.best_step == min(losses, key=losses.get)
        assert arm.val_loss == arm.best == min(losses.values())
        total, count = small.without_dropout(state.delta, small.params(), small.batch(100))
        assert arm.best == pytest.approx(float(total / count), rel=1e-5)
    assert progress[0].stopped == "early" and progress[0].best_step == int(states[0].step) - 3
    with pytest.raises(Killed):
        run(
            tmp_path / "killed",
            arms=arms,
            schedule=schedule,
            mode=mode,
            learn="constant",
            kill_at=5,
        )
    again, reached, _ = run(
        tmp_path / "killed", arms=arms, schedule=schedule, mode=mode, learn="constant"
    )
    small.assert_equal(again, states)
    for ours, theirs in zip(reached, progress, strict=True):
        assert dataclasses.replace(ours, seconds=0) == dataclasses.replace(theirs, seconds=0)


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


def test_throughput_is_told_where_a_loss_says_what_is_no_padding(tmp_path):
    schedule = dataclasses.replace(SCHEDULE, steps=1)
    for name, positions, tokens in (("told", small.LOSS.positions, 4 * 12), ("not", None, 0)):
        _, progress, records = run(tmp_path / name, schedule=schedule, positions=positions)
        rates = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
        assert [arm.tokens for arm in progress] == [tokens] * 2
        assert [arm.tokens_per_second is not None for arm in progress] == [tokens > 0] * 2
        assert len(rates) == (2 if tokens else 0)


def test_an_arm_is_given_up_where_its_loss_says_so(tmp_path):
    states, progress, records = run(tmp_path, give_up=lambda step, loss: step == 4)
    assert [arm.stopped for arm in progress] == ["given up"] * 2
    assert [int(state.step) for state in states] == [4, 4]
    assert [r["arm"] for r in records if r.get("event") == "given up"] == list(ARMS)
    _, progress, _ = run(tmp_path / "last", give_up=lambda step, loss: step == 6)
    assert [arm.stopped for arm in progress] == [None, None]  # at the last step none is
