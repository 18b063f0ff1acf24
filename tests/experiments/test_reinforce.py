"""Reinforcement by a rule: the task, refusals, rewards that fail, and runs as users do."""

import json
import math

import command
import jax
import numpy as np
import pytest

from configs import reinforce as recipe
from configs import tiny
from experiments import reinforce
from experiments.harness import reinforcement, sums


def configured(**settings):
    config = tiny.get_config()
    quick = {"train.loss": "grpo", "train.steps": 2, "reinforce.prompts": 2, "reinforce.group": 2,
             "reinforce.new_tokens": 2, "data.validation_examples": 2}  # fmt: skip
    config.update_from_flattened_dict(quick | settings)
    return config


@pytest.mark.parametrize(
    ("completion", "worth"),
    [
        ("12", 1.0),
        (" 12\n", 1.0),
        ("012", 1.0),
        ("13", 0.5),
        ("10", 1 / 3),
        ("1 2", 0.0),
        ("12.", 0.0),
        ("-12", 0.0),
        ("5 + 7 = 12", 0.0),
        ("\u0663", 0.0),
        ("9" * 5000, 0.0),
        ("", 0.0),
    ],
)
def test_what_a_sum_is_worth(completion, worth):
    assert sums.reward("", completion, {"answer": "12"}) == pytest.approx(worth)


def test_no_sum_is_learnt_from_and_held_out():
    train, held_out = sums.examples()
    names = [example["id"] for example in (*train, *held_out)]
    assert len(names) == len(set(names)) == sums.LARGEST**2 - 1
    assert "2+3" not in names  # it is shown
    assert len(held_out) == sums.HELD_OUT


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.loss": "next_token"}, "train.loss='next_token': expected one of grpo, dr_grpo"),
        ({"parallel.mode": "pmap"}, "on one device"),
        ({"train.accumulate": 2}, "on one device"),
        ({"reinforce.prompts": 0}, "reinforce.prompts=0: expected at least 1"),
        ({"reinforce.prompts": 9}, "at most config.data.validation_examples=2"),
        ({"sweep.ranks": ()}, "needs at least one rank"),
    ],
)
def test_what_cannot_be_run_is_refused_unloaded(settings, message):
    with pytest.raises(ValueError, match=message):
        reinforce.policy_arms(configured(**settings))


def test_the_cells_of_the_budget():
    config = recipe.get_config()
    config.sweep.update({"ranks": (1, 8, 64), "full": True})
    config.reinforce.ia3 = True
    arms = reinforce.policy_arms(config)
    assert [arm.name for arm in arms][-2:] == ["full", "IA3 of values"] and len(arms) == 5
    assert len({arm.step for arm in arms}) == 3


def test_prompts_come_in_the_same_order_and_go_on_where_they_were():
    config = configured()
    first = reinforcement._prompts(config, 5, 0)
    taken = [next(first)["example"] for _ in range(3)]
    position = json.loads(json.dumps(first.get_state()))
    rest = [next(first)["example"] for _ in range(4)]
    again = reinforcement._prompts(config, 5, 0)
    again.set_state(position)
    np.testing.assert_array_equal([next(again)["example"] for _ in range(4)], rest)
    assert len(set(np.concatenate(taken)[:5])) == 5  # an epoch holds each once
    other = reinforcement._prompts(config, 5, 1)
    assert any((next(other)["example"] != part).any() for part in taken)


def test_a_reward_that_fails_names_its_example_and_stops_or_is_left_out(tmp_path):
    """Before anything trains: the untuned base is rewarded first."""
    jax.config.update("jax_disable_most_optimizations", True)
    train, held_out = sums.examples()
    broken = held_out[1]["id"]

    def reward(prompt, completion, example):
        return math.nan if example["id"] == broken else 0.25

    task = reinforcement.Rewarded(train=train, held_out=held_out, reward=reward)
    load = reinforcement.loading(task)
    with pytest.raises(ValueError, match=rf"the reward of example {broken.replace('+', '.')}.*nan"):
        load(configured(), tmp_path, lambda record: None)
    shared = load(configured(**{"reinforce.on_error": "skip"}), tmp_path, lambda record: None)
    assert shared.task.base_loss == 0.75  # of the other example's answers


QUICK = (
    f"--config={command.ROOT}/configs/tiny.py",
    "--config.train.loss=grpo",
    "--config.train.steps=4",
    "--config.train.eval_every=2",
    "--config.train.checkpoint_every=1",
    "--config.data.validation_examples=4",
    "--config.samples.max_new_tokens=4",
)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_numbers_of_a_whole_one(tmp_path):
    flags = (*QUICK, "--config.reinforce.ia3=True", "--config.sweep.ranks=(1,)")
    code, output = command.run(tmp_path, "reinforce", *flags, "--workdir=whole")
    assert code == 0, output
    process = command.start(tmp_path, "reinforce", *flags, "--workdir=killed")
    command.kill_after_lines(process, tmp_path / "killed/metrics.jsonl", 3)
    code, output = command.run(tmp_path, "reinforce", *flags, "--workdir=killed")
    assert code == 0 and "continuing after step" in output, output
    whole, killed = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed")
    )
    assert [row["name"] for row in whole["arms"]] == ["all-linear r1", "IA3 of values"]
    for ours, theirs in zip(killed["arms"], whole["arms"], strict=True):
        assert ours["measured"] == theirs["measured"] and ours["val_loss"] == theirs["val_loss"]
    reports = json.loads((tmp_path / "whole/verify.json").read_text())
    assert len(reports) == 2 and all(found["ok"] for found in reports.values())


@pytest.mark.slow
def test_a_study_over_ranks_and_a_handful_of_parameters(tmp_path):
    flags = (*QUICK, "--budget=cpu", "--config.sweep.ranks=(1,)", "--config.sweep.full=False",
             "--config.study.most=3", "--config.train.steps=2", "--config.train.warmup_steps=1",
             "--workdir=run")  # fmt: skip
    code, output = command.run(tmp_path, "reinforce", *flags)
    assert code == 0, output
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["complete"] and results["compared"]["by"] == "reward"
    assert [cell["cell"] for cell in results["cells"]] == ["all-linear r1", "IA3 of values"]
    assert all(len(cell["measured"]["full reward"]) == 3 for cell in results["cells"])
