"""Which preference loss: what is measured, how cells are compared by it, and runs as users do."""

import json

import command
import pytest

import lora_jax as lora
from configs import preference as recipe
from configs import tiny
from experiments import preference
from experiments.harness import arms, encoding, preference_measures, setup
from experiments.harness.measures import Measures, compared_by
from experiments.harness.preference_measures import win_rate
from experiments.harness.study import report, search
from experiments.harness.study.summary import results_of
from lora_jax import data

RULES = search.Rules(factor=2.0, seeds=(0, 1, 2), margin=0.0, most=8)
MEASURES = Measures(of=lambda shared: None, names=("wins", "slips"), compared="wins")


def test_a_win_is_fewer_mistakes_and_a_tie_half():
    assert win_rate([0, 1, 2, 3], [1, 1, 1, 4]) == (1 + 0.5 + 0 + 1) / 4
    assert win_rate([2, 2], [2, 2]) == 0.5


def test_the_best_row_is_by_what_is_compared():
    rows = [{"measured": {"wins": w, "slips": s}} for w, s in ((0.2, 1), (0.9, 5), (0.5, 0))]
    assert MEASURES.better([*rows, {"measured": None}]) == 1
    fewest = Measures(of=MEASURES.of, names=MEASURES.names, compared="slips", highest=False)
    assert fewest.better(rows) == 2
    assert MEASURES.better([{"measured": None}]) is None


def a_row(cell, rate, seed, loss, wins):
    measured = None if wins is None else {"wins": wins, "slips": 1.0}
    return {"cell": cell, "learning_rate": rate, "seed": seed, "val_loss": loss, "stopped": None,
            "trainable_params": 1, "seconds": 1.0, "base": {}, "measured": measured}  # fmt: skip


def test_rates_are_by_a_cells_own_loss_and_cells_by_what_is_measured():
    """The losses of one cell are a hundred times those of the other, which has fewer wins."""
    cells = [
        arms.Arm(name=name, cell=name, rank=1, targets="qv", method=lora.LoRA(rank=1),
                 learning_rate=1e-3, seed=0, loss=loss)
        for name, loss in (("large", "ipo"), ("small", "dpo"))
    ]  # fmt: skip
    assert cells[0].step != cells[1].step  # neither search starts from the other's rate
    rows = []
    for cell, size, wins in (("large", 100.0, 0.8), ("small", 1.0, 0.3)):
        losses = {1e-3: size, 2e-3: 1.1 * size, 5e-4: 1.2 * size}
        rows += [a_row(cell, rate, 0, loss, 1 - wins) for rate, loss in losses.items()]
        rows[-3]["measured"]["wins"] = wins  # most wins are not what chooses a rate
        rows += [a_row(cell, 1e-3, seed, size, wins + seed / 100) for seed in (1, 2)]
    assert search.next_trial(RULES, cells, rows) is None
    results = results_of(RULES, cells, rows, compared_by(MEASURES))
    assert [cell["learning_rate"] for cell in results["cells"]] == [1e-3, 1e-3]
    assert [cell["mean"] for cell in results["cells"]] == pytest.approx([0.81, 0.31])
    said = report.findings(results)
    assert said == "large has the highest mean wins, 0.8100. Lower at 95%: small."
    assert report.header(results)[5:9] == (
        "mean wins", "95 % interval", "against the highest mean, paired", "slips"
    )  # fmt: skip
    rows[1]["measured"] = None  # of a run that diverged
    results_of(RULES, cells, rows, compared_by(MEASURES))
    by_loss = report.findings(results_of(RULES, cells, rows))
    assert by_loss == "small has the lowest mean, 1.0000. Higher at 95%: large."


def test_a_pair_is_its_chosen_answer_to_supervised_tuning():
    config = tiny.get_config()
    config.data.source = "preferences"
    config.data.validation_examples = 3
    model = setup.load_model(config)
    records = list(setup.records(config, "validation"))[:3]
    encoded = encoding.encode_conversations(records, model.tokenizer, seq_len=512)
    same = [{"messages": [*record["prompt"], *record["chosen"]]} for record in records]
    expected = data.encode_source(same, model.tokenizer, seq_len=512)
    for ours, theirs in zip(encoded.examples, expected.examples, strict=True):
        assert (ours["tokens"] == theirs["tokens"]).all()
    # Each loss validates the same records: three pairs are three chosen, and six judged answers.
    for loss, count in (("next_token", 3), ("dpo", 3), ("kto", 6)):
        config.train.loss = loss
        batches = setup.validation_batches(config, model)
        segments = [
            batch["segment_ids"].reshape(len(batch["segment_ids"]), -1) for batch in batches
        ]
        assert sum(int(part.max(1).sum()) for part in segments) == count


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preference.losses": ("dpo", "ppo")}, "has 'ppo': expected some of next_token, dpo"),
        ({"preference.losses": ()}, "has nothing: expected some of"),
        ({"data.source": "e2e"}, "data.source='e2e': the win rate is by a rule for the corpus"),
    ],
)
def test_what_cannot_be_compared_is_refused(settings, message):
    config = recipe.get_config()
    config.update_from_flattened_dict(settings)
    with pytest.raises(ValueError, match=message):
        preference.loss_cells(config)


def test_every_loss_is_a_cell_of_the_budget():
    config = recipe.get_config()
    config.preference.losses = tuple(preference.NAMES)
    cells = preference.loss_cells(config)
    assert len({cell.step for cell in cells}) == len(cells) == 7
    assert preference_measures.MEASURES.compared in preference_measures.MEASURES.names


QUICK = (
    f"--config={command.ROOT}/configs/tiny.py",
    "--config.data.source=preferences",
    "--config.data.validation_examples=3",
    "--config.train.steps=2",
    "--config.train.warmup_steps=1",
    "--config.train.checkpoint_every=2",
    "--config.train.eval_every=2",
    "--config.samples.max_new_tokens=4",
)


@pytest.mark.slow
def test_losses_of_several_kinds_in_one_run_and_the_same_command_again(tmp_path):
    flags = (*QUICK, "--config.preference.losses=('next_token', 'dpo', 'kto')", "--workdir=run")
    code, output = command.run(tmp_path, "preference", *flags)
    assert code == 0, output
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert [row["name"] for row in results["arms"]] == ["chosen alone", "DPO", "KTO"]
    assert results["base"]["measured"]["win rate"] == 0.5
    assert all(row["measured"].keys() == results["base"]["measured"].keys()
               for row in results["arms"])  # fmt: skip
    assert results["arms"][1]["perplexity"] is None and results["arms"][0]["perplexity"] > 1
    reports = json.loads((tmp_path / "run/verify.json").read_text())
    assert len(reports) == 3 and all(found["ok"] for found in reports.values())
    assert (tmp_path / "run/preference.png").stat().st_size > 0
    code, output = command.run(tmp_path, "preference", *flags)
    again = json.loads((tmp_path / "run/results.json").read_text())
    assert code == 0 and "continuing after step 2 of 2" in output
    assert [row["measured"] for row in again["arms"]] == [
        row["measured"] for row in results["arms"]
    ]


@pytest.mark.slow
def test_a_study_over_losses_forgetting_included(tmp_path):
    (tmp_path / "other.txt").write_text("A text of its own, about nothing in particular. " * 200)
    flags = (*QUICK, "--budget=cpu", "--config.preference.losses=('next_token', 'simpo')",
             "--config.study.other_text=other.txt", "--config.study.most=3", "--workdir=run",
             "--config.train.checkpoint_every=2")  # fmt: skip
    code, output = command.run(tmp_path, "preference", *flags)
    assert code == 0, output
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["complete"] and len(results["cells"]) == 2
    assert results["compared"] == {"by": "win rate", "highest": True}
    for cell in results["cells"]:
        assert len(cell["measured"]["margin"]) == len(cell["forgotten"]) == 3
        assert cell["mean"] == pytest.approx(sum(cell["values"].values()) / 3)
    table = (tmp_path / "run/results.md").read_text()
    assert "mean win rate" in table and "told right" in table and "forgotten" in table
