"""From a file of chats to an adapter, and what is said before and after."""

import contextlib
import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import command
import jax
import numpy as np
import pytest

from configs import finetune as recipe
from configs import tiny
from experiments import finetune
from experiments.harness import samples, setup, task, task_report, workdir
from lora_jax import data
from lora_jax.interop import load, peft, save_huggingface, shapes_alone
from lora_jax.interop.placing import StoredLeaf
from lora_jax.parallel import hosts
from lora_jax.training.fit import Preempted

COMPILED = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"


def chat(i):
    question = {"role": "user", "content": f"count to {i}"}
    answer = {"role": "assistant", "content": " ".join("ab"[j % 2] for j in range(i % 9 + 1))}
    return {"messages": [question, answer]}


def write(path, count=20, extra=()):
    lines = [json.dumps(chat(i)) for i in range(count)]
    path.write_text("\n".join([*lines, *extra]) + "\n")


def configured(**overrides):
    config = recipe.get_config()
    quick = {"model.source": "random", "model.shape": "tiny", "data.path": "chats.jsonl",
             "samples.prompts": 1, "samples.max_new_tokens": 4}  # fmt: skip
    config.lock()
    config.update_from_flattened_dict(quick | overrides)
    return config


@pytest.fixture(autouse=True)
def quickly(tmp_path, monkeypatch):
    jax.config.update("jax_disable_most_optimizations", True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    # What a run compiles, all tests share.
    xla, seconds = (jax.config.values[name] for name in COMPILED)
    monkeypatch.setattr(workdir, "default_cache_dir", lambda: Path(xla).parent)
    write(tmp_path / "chats.jsonl")
    yield
    jax.config.update(COMPILED[0], xla)
    jax.config.update(COMPILED[1], seconds)


def test_from_chats_to_an_adapter_and_again(tmp_path, capsys, monkeypatch):
    """The task first, then the run, which was stopped, and which the same command continues."""
    config = configured(**{"train.steps": 3, "train.learning_rate": 0.02})
    with monkeypatch.context() as stopped, pytest.raises(Preempted, match="after step 1 of 3"):
        asked = contextlib.nullcontext(lambda: True)
        stopped.setattr(hosts, "preemption", lambda: asked)
        finetune.finetune(config, Path("run"))
    capsys.readouterr()
    finetune.finetune(config, Path("run"))
    said = capsys.readouterr().out
    assert "continuing after step 1 of 3" in said
    told_first, ran = said.split("Fine-tuning with tiny: 1 arm, records in run")
    assert "chats.jsonl: 16 examples to train on, 4 to validate on" in told_first
    assert "LoRA r 16, alpha 32, dropout 0.1 on all-linear" in told_first
    assert "compiling one step for 1 arm\n" in ran and "there is no next command" in ran
    results = json.loads(Path("run/results.json").read_text())
    [arm] = results["arms"]
    assert arm["val_loss"] < results["base"]["val_loss"] and arm["name"] == "chats"
    assert {*results["samples"][0]} >= {"prompt", "reference", "base", "adapted"}
    assert Path("run/finetune.png").read_bytes()[:4] == b"\x89PNG"
    report = json.loads(Path("run/verify.json").read_text())["chats"]
    assert report["ok"] and report["digest"] == "agrees"
    stated = json.loads(Path("run/adapters/chats/adapter_config.json").read_text())
    assert (stated["r"], stated["lora_alpha"], stated["lora_dropout"]) == (16, 32, 0.1)
    card = Path("run/adapters/chats/README.md").read_text()
    assert "base_model: tiny" in card and "data: chats.jsonl" in card
    losses = [r for r in command.metrics(Path("run")) if "val_loss" in r]
    assert len(losses) == 3 and arm["val_loss"] == min(r["val_loss"] for r in losses)
    with pytest.raises(ValueError, match="holds another run, which differs in lora.rank"):
        finetune.finetune(configured(**{"train.steps": 3, "lora.rank": 8}), Path("run"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.steps": 2, "train.epochs": 1.0}, r"steps=2 and config.train.epochs=1 are both"),
        ({"train.steps": 0}, "config.train.steps=0: expected at least 1"),
        ({"train.epochs": 0.0}, "config.train.epochs=0: expected a number above 0"),
        ({"train.epochs": float("nan")}, "config.train.epochs=nan: expected"),
        ({"data.batch_size": 0}, "config.data.batch_size=0: expected at least 1"),
        ({"data.path": ""}, "no data: give --config.data.path=chats.jsonl"),
        ({"data.path": "none.jsonl"}, "No JSONL data at none.jsonl: expected a .jsonl file"),
        ({"data.path": "text.jsonl"}, "text.jsonl:21: not valid JSON, column 1"),
        ({"data.path": "keys.jsonl"}, r"keys.jsonl:21: expected .*found the keys \['instruction'"),
        ({"data.path": "empty.jsonl"}, "empty.jsonl:21: the response is empty"),
        ({"data.path": "silent.jsonl"}, r"silent.jsonl:21: messages\[1\], the assistant's, is emp"),
        ({"data.path": "few.jsonl"}, "few.jsonl has 7 examples, too few to hold 4 of them out"),
        ({"data.validation_path": "v.jsonl"}, "No JSONL validation data at v.jsonl"),
        ({"data.validation_share": 1.0}, "a validation share of 1.0: expected one between 0 and"),
        ({"data.validation_examples": 2}, "at most 2 validation examples: expected 4 or more"),
        ({"data.seq_len": 8}, r"the training examples: None of the 16 .*config.data.seq_len"),
        ({"data.seq_len": 4096}, "seq_len=4096 exceeds the model's context of 1024"),
        ({"data.path": "long.jsonl"}, "the training examples: None of .*cut into several"),
        ({"lora.targets": "q_prj"}, "target 'q_prj' matches nothing"),
        ({"lora.rank": 0}, r"LoRA\(rank=0\)"),
        ({"model.source": "nowhere"}, "'nowhere' is no model here.*--config.model.source=PATH"),
        ({"data.source": "restaurants", "data.validation_path": "x"}, "'restaurants' has valid"),
    ],
)
def test_wrong_input_ends_before_the_model_is_read(tmp_path, monkeypatch, overrides, message):
    bad = {"text": "hello", "keys": '{"instruction": "a"}', "empty": '{"prompt":"a","response":""}',
           "silent": '{"messages": [{"role": "user", "content": "a"},'
                     ' {"role": "assistant", "content": " "}]}'}  # fmt: skip
    for name, line in bad.items():
        write(tmp_path / f"{name}.jsonl", extra=[line])
    write(tmp_path / "few.jsonl", count=7)
    long = json.dumps({"prompt": "a" * 2000, "response": "b"})
    (tmp_path / "long.jsonl").write_text(f"{long}\n" * 20)
    monkeypatch.setattr(setup, "load_model", lambda config: pytest.fail("loads"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        finetune.finetune(configured(**overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_template_and_a_config_without_a_recipe_are_refused(monkeypatch):
    model = setup.model_without_weights(configured(**{"model.dtype": "float32"}))
    plain = dataclasses.replace(model.tokenizer, chat_template=None)
    monkeypatch.setattr(
        setup, "model_without_weights", lambda config: dataclasses.replace(model, tokenizer=plain)
    )
    with pytest.raises(ValueError, match=r"tiny has no chat template.*chat_template\.jinja"):
        task.settled(configured())
    with pytest.raises(ValueError, match=r"expected a file that starts from configs/finetune\.py"):
        task.settled(tiny.get_config())
    for loss in ("dpo", "kto"):
        with pytest.raises(ValueError, match="learns from pairs of answers, and this from chats"):
            task.settled(configured(**{"train.loss": loss}))
    with pytest.raises(ValueError, match="config.data.batch_size is None: experiments/finetune.py"):
        setup.require_filled(configured())
    setup.require_filled(tiny.get_config())


def test_what_follows_from_the_data_and_what_is_given(tmp_path, monkeypatch):
    found = task.settled(configured())
    settings = found.config
    assert settings.model.dtype == "float32" and found.epochs == settings.train.epochs == 3
    assert settings.data.seq_len == 128 and settings.lora.method.dropout == 0.1
    assert settings.train.learning_rate == 1e-3 and settings.train.warmup_steps >= 1
    assert settings.train.steps > settings.train.warmup_steps
    given = {"data.seq_len": 100, "data.batch_size": 3, "lora.method.dropout": 0.0,
             "train.steps": 7, "train.warmup_steps": 2, "train.eval_every": 5}  # fmt: skip
    kept = task.settled(configured(**given))
    flat = {key: kept.config[key.split(".")[0]] for key in given}
    for key, value in given.items():
        for part in key.split(".")[1:]:
            flat[key] = flat[key][part]
        assert flat[key] == value
    assert "7 steps" in task_report.in_words(kept)
    assert kept.epochs == 7 / task.settled(configured(**given | {
        "train.steps": None, "train.epochs": 1.0})).config.train.steps  # fmt: skip
    meshed = task.settled(configured(**{"parallel.mode": "fsdp"}))
    assert meshed.config.data.batch_size % jax.device_count() == 0
    for count, epochs, dropout in ((999, 3, 0.1), (1000, 2, 0.05), (10_000, 1, 0)):
        few = dataclasses.replace(found.examples.train, examples=[None] * count)
        config = configured(**{"data.seq_len": 8, "data.batch_size": 1, "data.pack": False})
        task._fill_schedule(config, few, found.model)
        assert (config.train.epochs, config.lora.method.dropout) == (epochs, dropout)
        assert config.train.steps == epochs * count


@pytest.mark.parametrize(("hidden", "rate"), [(576, 1e-3), (4096, 2e-4), (8192, 1e-4)])
def test_the_rate_follows_from_the_size(hidden, rate):
    """SmolLM2-135M, Llama-3-8B and 70B, as shapes."""
    name = {576: "smollm2-135m", 4096: "llama-3-8b", 8192: "llama-3-70b"}[hidden]
    config = configured(**{"model.shape": name})
    assert task.settled(config).config.train.learning_rate == rate


def test_skipped_examples_are_told_with_a_way_out(tmp_path):
    long = json.dumps({"prompt": "a" * 700, "response": "b"})
    write(tmp_path / "chats.jsonl", count=30, extra=[long])
    for given, way in (
        ({"data.seq_len": 128}, r"skipped as longer than seq_len \(128\): --config.data.seq_len=7"),
        ({}, "the longest 7.*rows of 768"),
    ):
        config = configured(**given, **{"data.seed": 1})
        text = task_report.in_words(task.settled(config))
        assert re.search(way, text), text


@pytest.mark.parametrize("pack", [True, False])
def test_so_many_epochs_are_so_many_batches(pack):
    """Each example has been seen as often as that, up to those in the last batch."""
    tokenizer = data.byte_tokenizer()
    source = data.encode_source([chat(i) for i in range(23)], tokenizer, seq_len=128)
    how = {"batch_size": 2, "seq_len": 128, "seed": 3, "pack": pack}
    for epochs in (0.5, 1.0, 2.0):
        count = data.count_batches(source, tokenizer, epochs=epochs, **how)
        batches = data.train_batches(source, tokenizer, **how)
        seen = np.cumsum([next(batches)["segment_ids"].max(axis=1).sum() for _ in range(count)])
        wanted = epochs * len(source.examples)
        assert seen[-1] >= wanted and (count == 1 or seen[-2] < wanted)


def test_the_shapes_are_those_of_the_model_and_nothing_is_read(tmp_path, monkeypatch):
    config = configured(**{"model.dtype": "bfloat16", "base.quantize": "nf4"})
    save_huggingface(tmp_path / "model", setup.load_model(configured(**{"model.dtype": "float32"})))
    for source in ("random", str(tmp_path / "model")):
        config.model.source = source
        model = setup.load_model(config)
        with monkeypatch.context() as patched:
            patched.setattr(StoredLeaf, "read", lambda leaf, index=None: pytest.fail("reads"))
            shapes = setup.model_without_weights(config)
        assert jax.tree.structure(shapes.params) == jax.tree.structure(model.params)
        same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype),
                            shapes.params, model.params)  # fmt: skip
        assert all(jax.tree.leaves(same)) and shapes.config == model.config
    assert load(tmp_path / "model", place=shapes_alone).name == "model"


def test_samples_are_of_the_last_answers_that_leave_room():
    model = setup.model_without_weights(configured(**{"model.dtype": "float32"}))
    user, assistant = ({"role": role, "content": role} for role in ("user", "assistant"))
    long = {"role": "user", "content": "x" * 300}
    held_out = [{"messages": m} for m in ([long, assistant], [user, assistant, user], [assistant])]
    asked = samples._asked(held_out, model, 5, 200)
    assert [messages for messages, _ in asked] == [[user, assistant], [assistant]]
    assert len(samples._asked(held_out, model, 1, 200)) == 1


def test_the_next_commands_name_what_the_scripts_must_know(tmp_path):
    found = task.settled(configured(**{"base.quantize": "nf4", "model.dtype": "bfloat16"}))
    found.config.model.source = "my models/one"
    answers = {"samples": [{"prompt": "two\nlines"}, {"prompt": "it's?"}]}
    text = task_report.next_commands(found, Path("a run"), answers)
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("  ")]
    scripts = [Path(words[1]).stem for words in commands]
    assert scripts == ["generate", "generate", "serve", "verify", "convert"]
    assert {"--base=my models/one", "--dtype=bfloat16", "--quantize=nf4", "it's?"} <= {*commands[0]}
    assert commands[1][-1] == "--chat" and "--model=my models/one" in commands[2]
    assert commands[3][2] == "a run/adapters/chats" and "--to=a run/merged" in commands[4]


@pytest.mark.slow
def test_the_printed_commands_run(tmp_path):
    """As a user types them: from a folder of a model to an adapter, and on."""
    save_huggingface(tmp_path / "model", setup.load_model(configured(**{"model.dtype": "float32"})))
    flags = ["--config.data.path=chats.jsonl", "--config.model.source=model",
             "--config.train.epochs=1", "--config.samples.max_new_tokens=4"]  # fmt: skip
    code, output = command.run(tmp_path, "finetune", *flags)
    assert code == 0, output
    lines = [line.split(" ", 1)[1] for line in map(str.strip, output.splitlines())
             if line.startswith("python /")]  # fmt: skip
    assert len(lines) == 5
    for line in lines:
        if "serve.py" in line:
            continue
        done = subprocess.run(
            [sys.executable, *shlex.split(line)], input="hello\n", text=True, cwd=tmp_path,
            capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (line, done.stdout, done.stderr)
    model = load(tmp_path / "model")
    [adapter] = tmp_path.glob("runs/*/adapters/chats")
    assert peft.load_adapter(adapter, model.params, peft.model_names(model.config))
    assert load(next(tmp_path.glob("runs/*/merged"))).config == model.config
    code, output = command.run(tmp_path, "finetune", *flags, "--config.train.steps=3")
    assert code != 0 and "are both given" in output and "Traceback" not in output
