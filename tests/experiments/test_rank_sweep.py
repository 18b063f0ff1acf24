"""The rank sweep as a user runs it."""

import json

import command
import pytest

pytestmark = pytest.mark.xdist_group("rank_sweep")  # they share a finished run
SWEEP = (
    *command.QUICK,
    "--config.sweep.ranks=(1, 3)",
    "--config.sweep.seeds=(0, 1)",
    "--config.sweep.full=True",
    "--config.lora.method.dropout=0.1",
    "--workdir=run",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    command.write_talk(folder)
    code, output = command.run(folder, "rank_sweep", *SWEEP, LORA_JAX_CACHE=str(folder / "cache"))
    assert code == 0, output
    return folder, output


def test_records(finished):
    folder, output = finished
    names = {path.name for path in (folder / "run").iterdir()}
    assert names >= {
        "config.json",
        "metrics.jsonl",
        "results.json",
        "results.md",
        "rank_sweep.png",
    }
    results = json.loads((folder / "run/results.json").read_text())
    assert results["base"]["val_loss"] > 0
    arms = results["arms"]
    assert [(arm["rank"], arm["seed"]) for arm in arms] == [
        (1, 0),
        (1, 1),
        (3, 0),
        (3, 1),
        (None, 0),
        (None, 1),
    ]
    fields = ("name", "targets", "trainable_params", "train_loss", "val_loss", "tokens_per_second")
    for arm in arms:
        assert all(arm[field] is not None for field in fields)
        assert arm["val_loss"] < results["base"]["val_loss"]
    assert 3 * arms[0]["trainable_params"] == arms[2]["trainable_params"]
    assert len(results["samples"]) == 1  # the file has one validation example
    table = (folder / "run/results.md").read_text()
    for arm in arms:
        assert arm["name"] in table and arm["name"] in output
    assert (folder / "run/rank_sweep.png").read_bytes()[:4] == b"\x89PNG"
    adapters = {path.name for path in (folder / "run/adapters").iterdir()}
    assert adapters == {f"{a['name'].replace(' ', '_')}" for a in arms if a["rank"]}
    stated = json.loads(
        (folder / "run/adapters/all-linear_r3_seed_1/adapter_config.json").read_text()
    )
    assert stated["r"] == 3 and stated["lora_dropout"] == 0.1
    reports = json.loads((folder / "run/verify.json").read_text())
    assert reports.keys() == adapters
    for name, report in reports.items():
        assert report["ok"] and report["digest"] == "agrees", report
        assert f"the adapter of {name.replace('_', ' ')}: nothing wrong; changes logits" in output
    records = command.metrics(folder / "run")
    losses = [r for r in records if r["arm"] == arms[0]["name"] and "loss" in r]
    assert [r["step"] for r in losses] == [1, 2, 3, 4]
    # Compiled steps are kept for the next run.
    assert any(
        path.name.startswith(("jit_step-", "jit_gradients-"))
        for path in (folder / "cache/xla").iterdir()
    )


@pytest.mark.slow
def test_another_config_in_the_same_workdir_is_refused(finished):
    folder, _ = finished
    code, output = command.run(folder, "rank_sweep", *SWEEP, "--config.train.steps=5")
    assert code != 0 and "train.steps (4 there, 5 here)" in output and "Traceback" not in output


@pytest.mark.slow
def test_kill_and_the_same_command_again(finished, tmp_path):
    """Killed among the LoRA arms, the run ends bit for bit where the whole one did."""
    whole, _ = finished
    command.write_talk(tmp_path)
    cache = {"LORA_JAX_CACHE": str(whole / "cache")}
    process = command.start(tmp_path, "rank_sweep", *SWEEP, **cache)
    command.kill_after_lines(process, tmp_path / "run/metrics.jsonl", 7)
    assert not (tmp_path / "run/results.json").exists()
    code, output = command.run(tmp_path, "rank_sweep", *SWEEP, **cache)
    assert code == 0, output

    def outcome(folder):
        arms = json.loads((folder / "run/results.json").read_text())["arms"]
        return [(arm["name"], arm["train_loss"], arm["val_loss"]) for arm in arms]

    def steps(folder):
        records = command.metrics(folder / "run")
        return [(r["arm"], r["step"], r.get("loss"), r.get("val_loss")) for r in records]

    assert outcome(tmp_path) == outcome(whole)
    assert steps(tmp_path) == steps(whole)


@pytest.mark.slow
def test_the_batched_mode_agrees(finished, tmp_path):
    folder, _ = finished
    command.write_talk(tmp_path)
    flags = (*SWEEP, "--config.sweep.full=False", "--config.sweep.mode=batched")
    code, output = command.run(tmp_path, "rank_sweep", *flags)
    assert code == 0, output

    def losses(path):
        arms = json.loads((path / "run/results.json").read_text())["arms"]
        return [arm["val_loss"] for arm in arms if arm["rank"] is not None]

    assert losses(tmp_path) == pytest.approx(losses(folder), rel=1e-4)
