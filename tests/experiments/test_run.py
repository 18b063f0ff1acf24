"""What a run of a sweep keeps when some of its arms go wrong, inside one process."""

import dataclasses
import json

import command
import jax
import jax.numpy as jnp
import pytest

import lora_jax as lora
from configs import tiny
from experiments.harness import arms, progress, report, run
from experiments.harness.losses import loss_of
from lora_jax import training
from lora_jax.interop import peft, save_huggingface


def configured(**train):
    config = tiny.get_config()
    quick = {"data.source": "jsonl", "data.path": "talk.jsonl", "data.seq_len": 128,
             "train.steps": 2, "train.warmup_steps": 0, "train.checkpoint_every": 2,
             "samples.prompts": 0}  # fmt: skip
    config.update_from_flattened_dict(quick | {f"train.{key}": v for key, v in train.items()})
    return config


def an_arm(name, **settings):
    defaults = {"targets": "q_proj", "method": lora.LoRA(rank=1), "learning_rate": 1e-3}
    return arms.Arm(name=name, rank=1, seed=0, **(defaults | settings))


@pytest.fixture(autouse=True)
def quickly(tmp_path, monkeypatch):
    jax.config.update("jax_disable_most_optimizations", True)
    monkeypatch.chdir(tmp_path)
    command.write_talk(tmp_path)


def ran(config, several, folder):
    folder.mkdir()
    with progress.reporting(folder / "metrics.jsonl") as log:
        results = run.run(config, several, folder, log)
    report.write(folder, "A run", "a command", results)
    return results


@pytest.mark.slow
def test_what_one_arm_lacks_costs_the_others_nothing(tmp_path, capsys):
    """A bottleneck has no form in PEFT, and full fine-tuning diverges alone."""
    several = [
        an_arm("beside", method=lora.Bottleneck(size=2)),
        an_arm("wild", method=lora.Full(), learning_rate=float("nan"), in_peft=False),
    ]
    results = ran(configured(), several, tmp_path / "run")
    told = capsys.readouterr().out
    assert "no adapter folder for beside" in told and "wild diverged at step 2" in told
    kept, lost = json.loads((tmp_path / "run/results.json").read_text())["arms"]
    assert kept["val_loss"] > 0 and lost["stopped"] == "diverged" and lost["val_loss"] is None
    assert results["arms"][0] == kept
    assert not any((tmp_path / "run").glob("adapters/*"))


def test_a_run_that_is_nothing_but_diverged_arms_says_so(tmp_path):
    wild = an_arm("wild", method=lora.Full(), learning_rate=float("nan"), in_peft=False)
    with pytest.raises(ValueError, match="the loss of every arm stopped being a number"):
        ran(configured(), [wild], tmp_path / "run")


@pytest.mark.slow
def test_other_data_in_the_same_workdir_are_refused_by_what_differs(tmp_path):
    """The same path with other contents, and settings that a caller changed."""
    config = configured(steps=1)
    ran(config, [an_arm("one")], tmp_path / "run")
    text = (tmp_path / "talk.jsonl").read_text()
    (tmp_path / "talk.jsonl").write_text(text.replace("a b a", "b a b"))
    with pytest.raises(
        ValueError, match=r"data\.examples is \w+ there and \w+ here.*another --workd"
    ):
        again(config, [an_arm("one")], tmp_path / "run")
    (tmp_path / "talk.jsonl").write_text(text)
    for key, value in {"seq_len": 120, "seed": 1, "pack": False}.items():
        other = configured(steps=1)
        other.data[key] = value
        with pytest.raises(ValueError, match=rf"data\.{key} is .* there and {value} here"):
            again(other, [an_arm("one")], tmp_path / "run")


def again(config, several, folder):
    return run.run(config, several, folder, lambda record: None)


def test_the_best_is_reported_saved_and_sampled_from(tmp_path):
    """At a rate at which the loss rises again after its first steps."""
    config = configured(
        steps=8, patience=2, eval_every=1, schedule="constant", optimizer="lion", clip_norm=1.0
    )
    results = ran(config, [an_arm("one", learning_rate=0.05)], tmp_path / "run")
    losses = [
        record["val_loss"] for record in command.metrics(tmp_path / "run") if "val_loss" in record
    ]
    [arm] = results["arms"]
    assert arm["val_loss"] == min(losses) < losses[-1] and arm["stopped"] == "early"
    model = run.setup.load_model(config)
    [saved] = (tmp_path / "run/adapters").iterdir()
    delta = peft.load_adapter(saved, model.params, peft.model_names(model.config))
    loss = loss_of(config, model.config, model.params)
    sums = [
        loss(delta, model.params, batch, None)
        for batch in run.setup.validation_batches(config, model)
    ]
    assert run.setup.mean_loss(sums) == pytest.approx(min(losses), rel=1e-5)


def test_validation_without_an_answer_is_refused():
    with pytest.raises(ValueError, match="no token of the validation examples counts"):
        run.setup.mean_loss([(0.0, 0.0), (0.0, 0.0)])


def test_an_unknown_template_is_refused():
    config = configured()
    config.data.template = "alpaca"
    with pytest.raises(ValueError, match=r"data\.template='alpaca': expected chat"):
        run.setup.load_model(config)


def test_an_unknown_optimizer_is_refused_before_the_model_is_loaded(tmp_path):
    config = configured(optimizer="adamx")
    config.model.source = "no such model"
    with pytest.raises(
        ValueError, match="optimizer 'adamx': expected one of adamw, muon, adafactor"
    ):
        again(config, [an_arm("one")], tmp_path)


def test_arms_whose_names_differ_have_folders_that_differ():
    plus = an_arm("LoRA+ lr 0.003 seed 1")
    assert plus.folder == "LoRA+_lr_0.003_seed_1"
    assert dataclasses.replace(plus, name="LoRA lr 0.003 seed 1").folder != plus.folder


def test_sizes_taken_from_another_shape_are_refused():
    config = configured()
    config.model.shape = "tiny"
    model = run.setup.load_model(config)
    config.model.shape = "smollm2-135m"
    with pytest.raises(ValueError, match="is not the shape of tiny. Give the model's own: one of"):
        run.setup.require_shape(config, model)


def test_packed_weights_wait_on_the_host_for_the_mesh(tmp_path):
    """Here a CPU that is not the default device stands for the host."""
    config = configured()
    model = run.setup.load_model(config)
    packed = dataclasses.replace(model, params=lora.quantize(model.params, "nf4"))
    save_huggingface(tmp_path / "packed", packed)
    config.model.source = str(tmp_path / "packed")
    config.parallel.mode = "fsdp"
    host, other = jax.devices()[0], jax.devices()[3]
    with jax.default_device(other):
        assert jnp.zeros(1).devices() == {other}
        params = run.setup.load_model(config).params
    assert params["layers"]["mlp"]["up_proj"].codes.devices() == {host}
    assert len(params["embed"].devices()) == 8


def test_a_loss_that_is_none_or_whose_batches_nobody_makes_is_refused_unloaded(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(run.setup, "load_model", lambda config: pytest.fail("loads"))
    entry = training.LOSSES["next_token"]._replace(batches="rollouts")
    monkeypatch.setitem(training.LOSSES, "pairs", entry)
    with pytest.raises(ValueError, match="loss='next': expected one of next_token, .*pairs"):
        ran(configured(loss="next"), [an_arm("one")], tmp_path / "one")
    with pytest.raises(
        ValueError,
        match=r"train\.loss='pairs' takes rollouts batches.*make next-token, preference, judged ",
    ):
        ran(configured(loss="pairs"), [an_arm("one")], tmp_path / "two")
