"""The comparison of methods: its cells, its costs, and a run of it."""

import json

import command
import jax
import pytest
from ml_collections import ConfigDict

from configs import smollm2_135m, tiny
from experiments.harness import comparison, costs, setup
from experiments.harness.other_text import text_batches
from experiments.harness.study import pictures, report, study
from experiments.methods import STUDY, method_arms


def configured(**methods) -> ConfigDict:
    config = tiny.get_config()
    quick = {"data.source": "jsonl", "data.path": "talk.jsonl", "data.seq_len": 128,
             "train.steps": 3, "train.warmup_steps": 1, "train.checkpoint_every": 3,
             "train.eval_every": 3, "samples.prompts": 0, "methods.ranks": (2,),
             "study.most": 3}  # fmt: skip
    config.update_from_flattened_dict(quick | {f"methods.{k}": v for k, v in methods.items()})
    return config


def cells_of(config: ConfigDict):
    return comparison.method_cells(config, method_arms(config))


def conducted(config: ConfigDict, folder) -> dict:
    study.conduct("methods", "Methods", config, cells_of(config), folder, STUDY)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_sizes_meet_the_budgets():
    """Within half of what one more rank would add; what has a size of its own comes once."""
    config = smollm2_135m.get_config()
    config.methods.ranks = (8, 16)
    sizes: dict = {}
    for cell in cells_of(config):
        sizes.setdefault(cell.label, []).append(cell.rank)
    assert sizes == {
        "LoRA": [8, 16], "rsLoRA": [8, 16], "LoRA+": [8, 16], "LoRA-FA": [16, 31],
        "PiSSA": [8, 16], "OLoRA": [8, 16], "DoRA": [7, 15], "AdaLoRA": [8, 16],
        "Bottleneck": [35, 70], "VeRA": [None], "IA3": [None], "Prompt": [None],
        "Prefix": [None], "Full": [None],
    }  # fmt: skip


def test_every_method_again_at_one_rate():
    config = configured(names=("LoRA", "IA3"), fixed_rate=1e-4)
    cells = {cell.cell: cell for cell in cells_of(config)}
    assert list(cells) == ["LoRA 2", "IA3", "LoRA 2 at 0.0001", "IA3 at 0.0001"]
    assert [cell.fixed_rate for cell in cells.values()] == [False, False, True, True]
    assert {cell.learning_rate for cell in cells.values() if cell.fixed_rate} == {1e-4}


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"names": ("LoRA", "LoKr")}, "has 'LoKr': expected some of LoRA, rsLoRA"),
        ({"ranks": ()}, "methods.ranks is empty"),
    ],
)
def test_wrong_input_gets_one_clear_sentence(methods, message):
    with pytest.raises(ValueError, match=message):
        cells_of(configured(**methods))


def test_a_step_that_the_compiler_refuses_costs_no_results(tmp_path, monkeypatch):
    class Refused:
        def cost_analysis(self):
            return {"flops": 1e9}

        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(costs, "_lowered", lambda *_, **__: Refused())
    config = configured(names=("LoRA",))
    trained = {"cell": "LoRA 2", "group": "tuned", "trainable_params": 1, "learning_rate": 1.0,
               "edge": True, "tried": 1, "losses": {0: 2.0},
               "mean": 2.0, "interval": None}  # fmt: skip
    found = {"cells": [trained], "base": {"val_loss": 3.0}, "differences": []}
    results = comparison.with_costs(config, cells_of(config), found)
    shown = dict(zip(report.header(results), report.cells(results)[0], strict=True))
    assert shown["GFLOP"] == "1.0" and "peak MB" not in shown
    pictures.loss_by_method(tmp_path / "methods.png", results)
    assert (tmp_path / "methods.png").exists()


@pytest.mark.slow
def test_a_run(tmp_path, monkeypatch):
    """Of a method that begins with a part of the base, which adapters have in another form, and
    what it forgets."""
    jax.config.update("jax_disable_most_optimizations", True)
    monkeypatch.chdir(tmp_path)
    command.write_talk(tmp_path)
    (tmp_path / "text.txt").write_text("Something else entirely. " * 40)
    config = configured(names=("PiSSA",), fixed_rate=1e-4)
    config.study.other_text = "text.txt"
    results = conducted(config, tmp_path / "run")
    tuned, fixed = results["cells"]
    assert tuned["trainable_params"] == 4096  # both factors at rank 2, of the adapter as trained
    assert tuned["flops"] > 0 and tuned["peak_bytes"] > tuned["temp_bytes"] > 0
    assert tuned["tried"] == 3 and fixed["tried"] == 1 and fixed["learning_rate"] == 1e-4
    assert tuned["mean"] < fixed["mean"] < results["base"]["val_loss"]
    assert len(tuned["forgotten"]) == 3
    # Random weights have nothing to forget: they move, and by more at the higher rate.
    assert max(map(abs, tuned["forgotten"])) > max(map(abs, fixed["forgotten"]))
    assert not fixed["edge"]
    table = (tmp_path / "run/results.md").read_text()
    assert report.findings(results) in table and "forgotten" in table
    assert (tmp_path / "run/methods.png").read_bytes()[:4] == b"\x89PNG"
    for folder in (
        tmp_path / "run/adapters"
    ).iterdir():  # of the model as loaded, of twice the rank
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.slow
def test_methods_of_all_kinds(tmp_path, monkeypatch):
    """Of those that differ in what the harness does with them; the others differ in the method."""
    monkeypatch.chdir(tmp_path)
    command.write_talk(tmp_path)
    names = ("LoRA+", "LoRA-FA", "AdaLoRA", "Bottleneck", "Prompt", "Full")
    results = conducted(configured(names=names), tmp_path / "run")
    assert [cell["label"] for cell in results["cells"]] == list(names)
    assert all(cell["interval"] for cell in results["cells"])


def test_another_text_must_fill_a_batch(tmp_path):
    model = setup.load_model(configured())
    sizes = {"rows": 2, "length": 128}
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(ValueError, match="10 tokens, which do not fill a batch of 2 x 129"):
        text_batches(model, tmp_path / "short.txt", **sizes)
    with pytest.raises(ValueError, match="expected a file of UTF-8 text"):
        text_batches(model, tmp_path / "none.txt", **sizes)
    (tmp_path / "long.txt").write_text("Long enough. " * 60)
    batches = text_batches(model, tmp_path / "long.txt", **sizes)
    assert len(batches) == 3 and batches[0]["tokens"].shape == (2, 128)
    for batch in batches:
        assert (batch["tokens"][:, 1:] == batch["targets"][:, :-1]).all()
