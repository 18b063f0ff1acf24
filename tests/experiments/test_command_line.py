"""Plans, and what a user is told when something is wrong."""

import command
import pytest
from ml_collections import ConfigDict

from configs import llama8b, llama70b, tiny
from experiments.harness import plan, setup
from experiments.harness.arms import rank_arms, target_arms
from experiments.harness.main import conduct

SLOW = pytest.mark.slow


@pytest.mark.slow
def test_the_plan_of_8b_needs_no_weights(tmp_path):
    config = f"--config={command.ROOT}/configs/llama8b.py"
    code, output = command.run(tmp_path, "rank_sweep", config, "--plan")
    assert code == 0, output
    assert "8,030,261,248 parameters, 16.06 GB" in output
    assert ["all-linear", "r16", "41,943,040"] in [line.split()[:3] for line in output.splitlines()]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_plan_of_8b_in_four_bits(tmp_path):
    flags = (f"--config={command.ROOT}/configs/llama8b.py", "--config.base.quantize=nf4")
    code, output = command.run(tmp_path, "rank_sweep", *flags, "--plan")
    assert code == 0 and "8,030,261,248 parameters, 5.70 GB in bfloat16 and nf4" in output


def test_the_plan_of_70b_ablates_targets():
    config = llama70b.get_config()
    table = plan.plan(config, target_arms(config, plan.params_per_rank(config)))
    assert "70,553,706,496 parameters" in table and "attention r16" in table


def test_8b_without_a_checkpoint_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    way_out = "hf download meta-llama/Meta-Llama-3-8B-Instruct.*--config.model.source="
    with pytest.raises(FileNotFoundError, match=way_out):
        setup.load_model(llama8b.get_config())


@pytest.mark.slow
def test_an_unknown_key_is_named(tmp_path):
    code, output = command.run(tmp_path, "rank_sweep", "--config.train.stepz=3", "--plan")
    assert code != 0 and "stepz" in output and "steps" in output


def conduct_tiny(folder, overrides: dict) -> None:
    command.write_talk(folder)
    (folder / "broken.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    (folder / "empty.jsonl").write_text("")
    config: ConfigDict = tiny.get_config()
    talk = {"data.source": "jsonl", "data.path": "talk.jsonl", "data.seq_len": 128}
    config.update_from_flattened_dict({**talk, "train.steps": 4, **overrides})
    plan.params_per_rank(config)
    conduct("rank_sweep", "", config, rank_arms(config), folder / "run", lambda path, results: None)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sweep.ranks": (0, 4)}, r"LoRA\(rank=0\): a rank is an integer of at least 1"),
        ({"sweep.ranks": (4, -1)}, r"LoRA\(rank=-1\)"),
        pytest.param(
            {"sweep.ranks": (65,)},
            r"layers/attn/k_proj: LoRA\(rank=65\) exceeds the smaller side",
            marks=SLOW,
        ),
        (
            {"lora.targets": "q_prj"},
            "target 'q_prj' matches nothing. The nearest paths are: .*q_pr",
        ),
        ({"data.source": "wikipedia"}, "expected restaurants, e2e, jsonl or tfds:NAME"),
        ({"data.path": "absent.jsonl"}, r"absent\.jsonl"),
        ({"data.path": "broken.jsonl"}, r"broken\.jsonl.*2"),
        ({"data.path": "empty.jsonl"}, r"empty\.jsonl"),
        pytest.param({"data.seq_len": 2000}, "exceeds the model's context of 1024", marks=SLOW),
        ({"data.seq_len": 8}, "fits a context of 8 tokens"),
        ({"model.shape": "huge"}, "expected one of tiny, smollm2-135m"),
        pytest.param(
            {"model.remat": "some"}, "expected one of none, elementwise, full", marks=SLOW
        ),
        ({"train.warmup_steps": 9}, "warmup_steps=9 must be at least 0 and less than steps=4"),
        pytest.param(
            {"train.accumulate": 3},
            "2 rows cannot be split over config.train.accumulate=3",
            marks=SLOW,
        ),
        ({"train.accumulate": 0}, "train.accumulate=0: expected 1 or more"),
        ({"lora.method.scaling": "sqrt"}, "expected one of lora, rslora"),
        ({"base.quantize": "nf5"}, "format 'nf5': expected one of nf4, fp4"),
        ({"train.optimizer_memory": "disk"}, "expected one of device, pinned_host"),
        ({"sweep.mode": "parallel"}, "expected one of auto, batched, in_turn"),
    ],
)
def test_wrong_input_gets_one_clear_sentence(tmp_path, monkeypatch, overrides, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        conduct_tiny(tmp_path, overrides)
