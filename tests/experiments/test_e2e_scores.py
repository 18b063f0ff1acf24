"""Scores of saved arms, as a user asks for them."""

import json

import command
import jax
import pytest

import lora_jax as lora
from configs import tiny
from experiments import e2e_scores
from experiments.harness import setup
from experiments.scores.generated import Items
from lora_jax.interop import peft

FLAGS = (
    f"--config={command.ROOT}/configs/tiny.py",
    "--config.data.source=e2e",
    "--config.data.path=e2e",
    "--config.data.template=plain",
)


def test_a_sample_is_evenly_spaced_and_keeps_items_together():
    items = Items([str(i) for i in range(10)], [[f"about {i}"] for i in range(10)])
    kept = e2e_scores.sampled(items, 3)
    assert kept.meanings == ["0", "3", "6"]
    assert kept.references == [["about 0"], ["about 3"], ["about 6"]]
    assert e2e_scores.sampled(items, 0) == e2e_scores.sampled(items, 99) == items


@pytest.mark.slow
def test_arms_are_scored_once(tmp_path):
    config = tiny.get_config()
    model = setup.load_model(config)
    (tmp_path / "e2e").mkdir()
    text = "".join(f"name : {n} | food : {f}||{n} serves {f} .\n{''}" for n in "ABC" for f in "XY")
    for name in ("train", "valid", "test"):
        (tmp_path / f"e2e/{name}.txt").write_text(text)
    for seed in (0, 1):
        _, delta = lora.lora_transform(
            model.params, lora.LoRA(rank=1), targets="qv", key=jax.random.key(seed)
        )
        delta = jax.tree.map(lambda x: x + 0.3, delta)
        peft.save_adapter(
            tmp_path / f"run/adapters/seed_{seed}", delta, model.params,
            peft.model_names(model.config), base_name="tiny",
            num_kv_heads=model.config.num_kv_heads,
        )  # fmt: skip
    flags = (*FLAGS, "--runs=run", "--meanings=3", "--workdir=scored")
    code, output = command.run(tmp_path, "e2e_scores", *flags, "--arms=seed_0")
    assert code == 0, output
    code, output = command.run(tmp_path, "e2e_scores", *flags)
    assert code == 0, output
    lines = [json.loads(line) for line in (tmp_path / "scored/scores.jsonl").read_text().split("\n")
             if line]  # fmt: skip
    assert [line["arm"] for line in lines] == ["untuned base", "seed_0", "seed_1"]
    assert all(len(line["answers"]) == 3 for line in lines)
    results = json.loads((tmp_path / "scored/results.json").read_text())
    assert [row["arm"] for row in results["arms"]] == [line["arm"] for line in lines]
    assert "Greedy answers to 3" in (tmp_path / "scored/results.md").read_text()
    code, output = command.run(tmp_path, "e2e_scores", f"--config={command.ROOT}/configs/tiny.py")
    assert code != 0 and "data.source='restaurants': expected e2e" in output
