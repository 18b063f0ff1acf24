"""A study: which run comes next, what may be said of the runs, and a whole one."""

import json
import math

import chex
import command
import numpy as np
import pytest

import lora_jax as lora
from configs import base, tiny
from configs.budgets import BUDGETS
from experiments.harness import arms
from experiments.harness.study import pictures, report, search, study
from experiments.harness.study.statistics import interval, paired
from experiments.harness.study.summary import results_of

RULES = search.Rules(factor=2.0, seeds=(0, 1, 2), margin=0.1, most=8)


def a_cell(name, rate=1e-3, method=None, label=""):
    return arms.Arm(
        name=name, cell=name, rank=1, targets="qv", method=method or lora.LoRA(rank=1),
        learning_rate=rate, seed=0, label=label,
    )  # fmt: skip


def loss_of(rate, best, seed=0):
    """A bowl over the logarithm of the rate."""
    return 1 + 0.3 * math.log2(rate / best) ** 2 + 0.001 * seed


def row_of(arm, best, **fields):
    loss = loss_of(arm.learning_rate, best, arm.seed)
    row = {"name": arm.name, "cell": arm.cell, "seed": arm.seed, "val_loss": loss, "stopped": None,
           "learning_rate": arm.learning_rate, "val_curve": [[4, loss + 0.5], [8, loss]],
           "trainable_params": 1, "seconds": 1.0, "base": {"val_loss": 3.0}}  # fmt: skip
    return row | fields


def all_rows(cells, bests, rules=RULES):
    rows = []
    while (arm := search.next_trial(rules, cells, rows)) is not None:
        is_hopeless = search.hopeless(rules, arm, rows)
        row = row_of(arm, bests[arm.cell])
        step, loss = row["val_curve"][0]
        if arm.seed == rules.seeds[0] and is_hopeless(step, loss):
            row |= {"stopped": "given up", "val_loss": loss}
        rows.append(row)
        assert len(rows) < 100
    return rows


@pytest.mark.parametrize("best", [1e-3, 2e-3, 2.5e-4, 1.7e-3, 1e-3 * 2**-5])
def test_the_best_rate_has_both_its_neighbours_and_all_seeds(best):
    cell = a_cell("one")
    rows = all_rows([cell], {"one": best})
    tried = search.tried_rates(rows, 0)
    found = search.best_rate(tried)
    nearest = 1e-3 * 2 ** round(math.log2(best / 1e-3))
    assert found == pytest.approx(nearest) and not search.is_edge(tried, 2.0)
    assert search.seeds_at(rows, found).keys() == {0, 1, 2}
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names)  # nothing is run twice


def test_a_cell_starts_where_the_one_before_ended_if_they_share_a_step():
    cells = [a_cell("one"), a_cell("two"), a_cell("full", 1e-4, lora.Full())]
    rows = all_rows(cells, {"one": 8e-3, "two": 8e-3, "full": 1e-4})
    counts = {cell.cell: len(search.of_cell(cell, rows)) for cell in cells}
    assert counts == {"one": 5 + 2, "two": 3 + 2, "full": 3 + 2}


def test_the_edge_of_what_may_be_tried_is_said():
    cell = a_cell("one")
    rows = all_rows([cell], {"one": 10.0})
    assert len(search.tried_rates(rows, 0)) == RULES.most
    [summary] = results_of(RULES, [cell], rows)["cells"]
    assert summary["edge"]
    assert "*" in report.cells(results_of(RULES, [cell], rows))[0][2]


def test_a_rate_that_diverges_is_lost_and_the_search_goes_down():
    cell = a_cell("one", 1.0)
    rows = []
    while (arm := search.next_trial(RULES, [cell], rows)) is not None:
        diverged = {"val_loss": None, "stopped": "diverged"} if arm.learning_rate > 0.2 else {}
        rows.append(row_of(arm, 0.125) | diverged)
    tried = search.tried_rates(rows, 0)
    assert sorted(tried) == [0.0625, 0.125, 0.25, 0.5, 1.0]
    assert search.best_rate(tried) == 0.125


def test_nothing_but_divergence_ends():
    cell, rows = a_cell("one"), []
    while (arm := search.next_trial(RULES, [cell], rows)) is not None:
        rows.append(row_of(arm, 1.0, val_loss=None, stopped="diverged"))
    assert len(rows) == RULES.most
    results = results_of(RULES, [cell], rows)
    assert results["complete"] and results["cells"][0]["mean"] is None
    assert "Nothing has been run" in report.findings(results)


def test_a_run_is_given_up_by_the_cells_own_best_at_the_same_step():
    cell = a_cell("one")
    done = [row_of(search.trial(cell, 1e-3, 0), 1e-3)]
    is_hopeless = search.hopeless(RULES, cell, done)
    at_four = done[0]["val_curve"][0][1]
    assert is_hopeless(4, at_four + 0.11) and not is_hopeless(4, at_four + 0.09)
    assert not is_hopeless(5, 100.0)  # where the best was not validated
    assert not search.hopeless(RULES, a_cell("two"), done)(4, 100.0)
    never = search.Rules(factor=2.0, seeds=(0, 1, 2), margin=0.0, most=8)
    assert not search.hopeless(never, cell, done)(4, 100.0)


def test_a_search_that_gives_up_finds_what_the_full_one_finds():
    bests = {"one": 4e-3}
    full = search.Rules(factor=2.0, seeds=(0, 1, 2), margin=0.0, most=8)
    rows = [all_rows([a_cell("one")], bests, rules) for rules in (RULES, full)]
    quick, whole = (search.best_rate(search.tried_rates(found, 0)) for found in rows)
    assert quick == whole
    assert any(row["stopped"] for row in rows[0]) and not any(row["stopped"] for row in rows[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": (0, 1)}, "at least three seeds"),
        ({"seeds": (0, 0, 0)}, "at least three seeds"),
        ({"factor": 3.0}, "by more than 1 and by at most 2"),
        ({"factor": 1.0}, "by more than 1 and by at most 2"),
        ({"most": 2}, "best learning rate and its two neighbours"),
        ({"margin": -1.0}, "0 or more nats"),
        ({"cells": ("all-linear r3",)}, "expected some of all-linear r1, all-linear r4"),
    ],
)
def test_rules_by_which_nothing_could_be_told_are_refused(settings, message):
    config = tiny.get_config()
    config.study.update(settings)
    what = study.Study(cells=arms.rank_cells, draw=pictures.loss_by_rank)
    with pytest.raises(ValueError, match=message):
        study.cells_of(config, what)


def test_intervals_are_students():
    """By hand: mean 2, s 1, n 3, t 4.302653 with two degrees of freedom."""
    found = interval([1.0, 2.0, 3.0])
    chex.assert_trees_all_close(
        tuple(found), (2.0, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5, 3), rtol=1e-6
    )
    rng = np.random.default_rng(0)
    hits = [i.low < 0 < i.high for i in (interval(rng.normal(size=3)) for _ in range(2000))]
    assert 0.93 < np.mean(hits) < 0.97
    with pytest.raises(ValueError, match="two values"):
        interval([1.0])


def test_pairs_are_of_the_same_seed():
    """Seeds move both by far more than they differ."""
    one, other = {0: 1.0, 1: 5.0, 2: 9.0}, {2: 8.9, 0: 0.9, 1: 4.9}
    found = paired(one, other)
    assert found.mean == pytest.approx(0.1) and found.leaves_out_zero
    assert not paired({0: 1.0, 1: 2.0, 2: 3.0}, {0: 2.0, 1: 3.1, 2: 1.0}).leaves_out_zero
    assert paired({0: 1.0, 1: None}, {0: 1.0, 1: 2.0}) is None
    assert paired({0: 1.0, 1: 2.0, 3: 1.0}, {0: 1.0, 1: 2.0, 4: 1.0}).seeds == 2


def test_only_what_an_interval_tells_apart_is_told_apart():
    cells = [a_cell("one"), a_cell("two"), a_cell("three")]
    losses = {"one": (1.0, 1.1, 1.2), "two": (1.2, 1.3, 1.4), "three": (1.05, 1.0, 1.3)}
    rows = [
        row_of(search.trial(cell, 1e-3, seed), 1e-3, val_loss=losses[cell.cell][seed])
        for cell in cells
        for seed in (0, 1, 2)
    ]
    said = report.findings(results_of(RULES, cells, rows))
    assert said.startswith("one has the lowest mean, 1.1000. Higher at 95%: two. Not told apart")
    assert said.endswith("from it: three. The study is not complete.")


def test_every_budget_is_a_config():
    for experiment, sizes in BUDGETS.items():
        assert sizes.keys() == {"cpu", "gpu"}, experiment
        for settings in sizes.values():
            config = base.get_config()
            config.update_from_flattened_dict(settings)  # of known names alone
            search.rules_of(config)


def ran(folder, monkeypatch, **settings):
    config = tiny.get_config()
    quick = {"data.source": "jsonl", "data.path": "talk.jsonl", "data.seq_len": 128,
             "data.template": "plain", "train.steps": 3, "train.warmup_steps": 1,
             "train.eval_every": 1, "train.checkpoint_every": 3, "study.most": 3,
             "sweep.ranks": (2,)}  # fmt: skip
    config.update_from_flattened_dict(quick | settings)
    what = study.Study(cells=arms.rank_cells, draw=pictures.loss_by_rank)
    cells = study.cells_of(config, what)
    study.conduct("rank_sweep", "Ranks", config, cells, folder, what)
    return json.loads((folder / "results.json").read_text())


def test_a_study_and_the_same_command_again(tmp_path, monkeypatch):
    """Interrupted after two runs, it makes the others, and ends with the numbers of a whole one."""
    monkeypatch.chdir(tmp_path)
    command.write_talk(tmp_path)
    whole = ran(tmp_path / "whole", monkeypatch)
    assert whole["complete"] and len(whole["arms"]) == 5
    assert {row["seed"] for row in whole["arms"]} == {0, 1, 2}
    [cell] = whole["cells"]
    assert cell["interval"][0] < cell["mean"] < cell["interval"][1] < whole["base"]["val_loss"]
    assert all(len(row["val_curve"]) == 3 for row in whole["arms"] if not row["stopped"])
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names >= {"arms.jsonl", "results.md", "rank_sweep.png", "adapters", "verify.json"}
    reports = json.loads((tmp_path / "whole/verify.json").read_text())
    assert len(reports) == sum(not row["stopped"] for row in whole["arms"])
    assert not any((tmp_path / "whole/checkpoints").iterdir())

    part = tmp_path / "part"
    part.mkdir()
    (part / "config.json").write_text((tmp_path / "whole/config.json").read_text())
    lines = (tmp_path / "whole/arms.jsonl").read_text().splitlines()
    (part / "arms.jsonl").write_text("\n".join(lines[:2]) + "\n" + lines[2][:40])  # cut off
    again = ran(part, monkeypatch)
    assert again["cells"] == whole["cells"]
    with pytest.raises(ValueError, match=r"differs in train\.steps"):
        ran(part, monkeypatch, **{"train.steps": 4})
