"""The target ablation as a user runs it."""

import json

import command
import pytest


@pytest.mark.slow
def test_equal_rank_and_equal_parameters(tmp_path):
    """With a paged optimizer."""
    command.write_talk(tmp_path)
    paged = ("--config.train.optimizer_memory=pinned_host",)
    flags = (*command.QUICK, *paged, "--config.ablation.rank=2", "--workdir=run")
    code, output = command.run(tmp_path, "target_ablation", *flags)
    assert code == 0, output
    arms = json.loads((tmp_path / "run/results.json").read_text())["arms"]
    assert len({arm["name"] for arm in arms}) == len(arms)
    presets = ["qv", "attention", "mlp", "all-linear"]
    assert [arm["targets"] for arm in arms if arm["group"] != "equal parameters"] == presets
    assert {arm["rank"] for arm in arms if arm["group"] != "equal parameters"} == {2}
    budget = next(a["trainable_params"] for a in arms if a["targets"] == "all-linear")
    for arm in arms:
        if arm["group"] == "equal parameters":
            per_rank = arm["trainable_params"] / arm["rank"]
            assert abs(arm["trainable_params"] - budget) <= per_rank / 2
    assert (tmp_path / "run/target_ablation.png").exists()
