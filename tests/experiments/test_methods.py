"""The comparison of methods: its arms, what it may say, and a run of it."""

import contextlib
import json

import command
import jax
import pytest
from ml_collections import ConfigDict

from configs import smollm2_135m, tiny
from experiments.harness import comparison, costs, pictures, report
from experiments.harness.main import conduct
from experiments.methods import method_arms


def configured(**methods) -> ConfigDict:
    config = tiny.get_config()
    quick = {"data.source": "jsonl", "data.path": "talk.jsonl", "data.seq_len": 128,
             "train.steps": 3, "train.warmup_steps": 1, "train.checkpoint_every": 3,
             "samples.prompts": 0, "methods.rank": 2}  # fmt: skip
    config.update_from_flattened_dict(quick | {f"methods.{k}": v for k, v in methods.items()})
    return config


def conducted(config: ConfigDict, folder) -> dict:
    arms = comparison.first_arms(config, method_arms(config))
    conduct("methods", "Methods", config, arms, folder / "run", pictures.loss_by_method,
            more=comparison.more_seeds, summarised=comparison.summarised)  # fmt: skip
    return json.loads((folder / "run/results.json").read_text())


@pytest.mark.slow
def test_sizes_meet_the_budget():
    """Within half of what one more rank would add; what has its own size keeps it."""
    config = smollm2_135m.get_config()
    arms = {arm.label: arm for arm in comparison.first_arms(config, method_arms(config))}
    sizes = {label: arm.rank for label, arm in arms.items()}
    assert sizes == {
        "LoRA": 8, "rsLoRA": 8, "LoRA+": 8, "LoRA-FA": 16, "PiSSA": 8, "OLoRA": 8, "DoRA": 7,
        "AdaLoRA": 8, "Bottleneck": 35, "VeRA": None, "IA3": None, "Prompt": None, "Prefix": None,
        "Full": None,
    }  # fmt: skip
    assert len({arm.name for arm in arms.values()}) == len(arms)


def row(method, *losses):
    return {"method": method, "val_losses": losses, "mean": sum(losses) / max(len(losses), 1)}


def test_findings_read_no_order_into_what_lies_inside_the_spread():
    said = comparison.findings([row("A", 1.2, 1.4), row("B", 1.3, 1.6), row("C", 1.5, 1.7)])
    assert said == (
        "A has the lowest mean loss. Inside its spread over 2 seeds lie B: no order should be read "
        "into these and it. Outside lie C."
    )
    assert comparison.findings([row("A", 1.2), row("B", 1.5)]).startswith("One seed shows no")
    assert comparison.findings([row("A", 1.2, 1.3), row("B")]).endswith("None lies outside.")


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"names": ("LoRA", "LoKr")}, "has 'LoKr': expected some of LoRA, rsLoRA"),
        ({"seeds": ()}, "at least one of rate_factors and one of seeds"),
    ],
)
def test_wrong_input_gets_one_clear_sentence(methods, message):
    config = configured(**methods)
    with pytest.raises(ValueError, match=message):
        comparison.first_arms(config, method_arms(config))


@pytest.mark.parametrize(("seeds", "divides"), [((0,), True), ((0, 1), False)])
def test_arms_that_devices_cannot_share_are_refused_before_training(seeds, divides):
    """Two rates train together, a further seed alone."""
    config = configured(names=("LoRA",), seeds=seeds)
    config.update_from_flattened_dict({"parallel.arms": 2, "sweep.mode": "batched"})
    message = "arms=2 does not divide .* together, 1 in number: LoRA lr 0.0015 seed 1"
    with contextlib.nullcontext() if divides else pytest.raises(ValueError, match=message):
        comparison.first_arms(config, method_arms(config))


def test_a_step_that_the_compiler_refuses_costs_no_results(tmp_path, monkeypatch):
    class Refused:
        def cost_analysis(self):
            return {"flops": 1e9}

        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(costs, "_lowered", lambda *_, **__: Refused())
    config = configured(names=("LoRA",))
    [first, _] = comparison.first_arms(config, method_arms(config))
    trained = {"label": "LoRA", "trainable_params": 1, "learning_rate": 1.0, "val_loss": 2.0}
    base = {"name": "tiny", "val_loss": 3.0}
    results = comparison.summarised(config, {"arms": [trained], "base": base}, [first])
    header, [_, cells], _ = report.by_method(results)
    shown = dict(zip(header, cells, strict=True))
    assert (shown["GFLOP"], shown["temp MB"], shown["peak MB"]) == ("1.0", "", "")
    pictures.loss_by_method(tmp_path / "methods.png", results)
    assert (tmp_path / "methods.png").exists()


@pytest.mark.slow
def test_a_run(tmp_path, monkeypatch):
    """Of a method that begins with a part of the base, which adapters have in another form."""
    jax.config.update("jax_disable_most_optimizations", True)
    monkeypatch.chdir(tmp_path)
    command.write_talk(tmp_path)
    results = conducted(configured(names=("PiSSA",)), tmp_path)
    slow, fast, other_seed = results["arms"]
    best = min(slow, fast, key=lambda arm: arm["val_loss"])
    [summary] = results["summary"]
    assert [arm["seed"] for arm in results["arms"]] == [0, 0, 1]
    assert summary["learning_rate"] == best["learning_rate"] == other_seed["learning_rate"]
    assert summary["val_losses"] == [best["val_loss"], other_seed["val_loss"]]
    assert max(summary["val_losses"]) < results["base"]["val_loss"]
    assert summary["trainable_params"] == 4096  # both factors at rank 2, of the adapter as trained
    assert summary["flops"] > 0 and summary["peak_bytes"] > summary["temp_bytes"] > 0
    assert results["findings"] in (tmp_path / "run/results.md").read_text()
    assert (tmp_path / "run/methods.png").read_bytes()[:4] == b"\x89PNG"
    for arm in results["arms"]:  # adapters of the model as loaded, of twice the rank
        folder = tmp_path / "run/adapters" / arm["name"].replace(" ", "_")
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.slow
def test_methods_of_all_kinds_and_the_same_command_again(tmp_path, monkeypatch):
    """Of those that differ in what the harness does with them; the others differ in the method."""
    monkeypatch.chdir(tmp_path)
    command.write_talk(tmp_path)
    names = ("LoRA+", "LoRA-FA", "AdaLoRA", "Bottleneck", "Prompt", "Full")
    config = configured(rate_factors=(1.0,), names=names)
    first = conducted(config, tmp_path)
    assert [row["method"] for row in first["summary"]] == list(names)
    records = command.metrics(tmp_path / "run")
    again = conducted(config, tmp_path)
    assert command.metrics(tmp_path / "run") == records  # nothing was trained again
    assert [row["val_losses"] for row in again["summary"]] == [
        row["val_losses"] for row in first["summary"]
    ]
