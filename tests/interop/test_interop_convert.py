"""`scripts/convert.py`, from one format to the next, on a small model."""

import ast
import dataclasses
import itertools
import json
import re
from pathlib import Path

import cases
import chex
import jax
import numpy as np
import pytest
import small_checkpoints
import small_llamas
from absl import flags

import lora_jax as lora
from lora_jax.interop import load, peft, quantized, save_huggingface
from lora_jax.models import llama

ROOT = Path(__file__).parents[2]
SCRIPT = "convert.py"
TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("convert") / "model"
    return small_checkpoints.write_huggingface(path, *small_checkpoints.small("llama3_1"))


def run(script, **arguments):
    flags.FLAGS.unparse_flags()
    for name in (
        "from",
        "to",
        "adapter",
        "merge",
        "dtype",
        "kind",
        "quantize",
        "profile",
        "check_base",
    ):
        flags.FLAGS[name].unparse()
    flags.FLAGS(["convert", *(f"--{name}={value}" for name, value in arguments.items())])
    return script.convert()


def logits(model, delta=None):
    weights = lora.bind(model.params, delta or {})
    return np.asarray(jax.jit(llama.forward, static_argnums=2)(weights, TOKENS, model.config))


def test_folders_files_and_merged_adapters(script, folder, tmp_path):
    model = load(folder)
    delta = cases.llama_delta(model.params, lora.LoRA(rank=2), size=0.03)
    adapter = tmp_path / "adapter"
    peft.save_adapter(adapter, delta, model.params, peft.model_names(model.config))
    whole = {"from": folder, "adapter": adapter}

    said = run(script, to=tmp_path / "merged", merge=True, **whole)
    assert "Hugging Face folder" in said["written"] and "trainable params" in said["adapter"]
    expected = logits(model, delta)
    cases.assert_close(logits(load(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-5)

    run(script, **{"from": tmp_path / "merged"}, to=tmp_path / "m.gguf")
    found = logits(load(tmp_path / "m.gguf"))
    assert np.abs(found - expected).max() < 0.005 * np.abs(expected).max()

    run(script, to=tmp_path / "served", profile="vllm", **whole)
    stated = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    assert stated["r"] == 8 and stated["base_model_name_or_path"] == str(folder)


def test_folders_in_4_bits(script, tmp_path):
    config = small_llamas.VARIANTS["llama2"] | {"intermediate_size": 64}
    weights = small_llamas.draw_weights(config)
    folder = small_checkpoints.write_huggingface(tmp_path / "plain", config, weights)
    said = run(script, **{"from": folder}, to=tmp_path / "nf4", quantize="nf4")
    assert "Hugging Face folder, nf4 of bitsandbytes" in said["written"]
    params = load(folder, place=quantized("nf4")).params
    found = load(tmp_path / "nf4")
    chex.assert_trees_all_equal(found.params, params)
    again = run(script, **{"from": tmp_path / "nf4"}, to=tmp_path / "again")
    assert again["model"].partition(",")[2] == said["model"].partition(",")[2]
    chex.assert_trees_all_equal(load(tmp_path / "again").params, params)

    run(script, **{"from": tmp_path / "nf4"}, to=tmp_path / "floats", quantize="none")
    chex.assert_trees_all_equal(load(tmp_path / "floats").params, lora.dequantize(params))
    run(script, **{"from": tmp_path / "nf4"}, to=tmp_path / "floats.gguf", quantize="none")
    logits_there = logits(load(tmp_path / "floats"))
    found_there = logits(load(tmp_path / "floats.gguf"))
    assert np.abs(found_there - logits_there).max() < 0.005 * np.abs(logits_there).max()


def test_merging_into_4_bits(script, tmp_path):
    """Into those of the base, into others, or into floats: what was asked for, and said."""
    config = small_llamas.VARIANTS["llama2"] | {"intermediate_size": 64}
    dense = small_checkpoints.write_huggingface(
        tmp_path / "plain", config, small_llamas.draw_weights(config)
    )
    run(script, **{"from": dense}, to=tmp_path / "nf4", quantize="nf4")
    model = load(tmp_path / "nf4")
    delta = cases.llama_delta(model.params, lora.LoRA(rank=2), size=0.03, targets="attention")
    adapter = tmp_path / "adapter"
    peft.save_adapter(adapter, delta, model.params, peft.model_names(model.config))
    whole = {"from": tmp_path / "nf4", "adapter": adapter, "merge": True}
    plain = lora.dequantize(lora.merge(model.params, delta))
    expected = {
        "nf4": lora.merge(model.params, delta, requantize=True),
        "fp4": lora.quantize(plain, "fp4"),
        "none": plain,
    }
    for how, params in expected.items():
        said = run(script, **whole, to=tmp_path / f"to-{how}", quantize=how)
        result = "is in floats" if how == "none" else f"is rounded to {how}"
        assert said["merged"] == f"into a base in nf4; the result {result}"
        chex.assert_trees_all_equal(load(tmp_path / f"to-{how}").params, params)


class LoadingError(Exception):
    """Raised where the work would begin."""


def oracle(source, to, adapter, merge, quantize, kind, profile, dtype) -> str | None:
    """The error of a command; None where it works."""
    writes_adapter = adapter and not merge
    if merge and not adapter:
        return "--merge needs an --adapter"
    if writes_adapter and to == "new.gguf":
        return "is a GGUF file, and an adapter is written as a folder: add --merge"
    if writes_adapter and quantize:
        return "--quantize is of a model"
    if to == "new.gguf" and quantize in ("nf4", "fp4"):
        return "--quantize=... needs a --to that is a model's Hugging Face folder"
    if kind and to != "new.gguf":
        return "--kind is of a GGUF file"
    if dtype and (to == "new.gguf" or writes_adapter):
        return "--dtype is of a model's folder"
    if profile and not writes_adapter:
        return "--profile is of an adapter"
    if source != "packed":
        return "is in floats already; leave --quantize out" if quantize == "none" else None
    if quantize == "none":
        return None
    if to == "new.gguf":
        return "is in 4 bits, of a format that GGUF has not: --quantize=none"
    if merge and not quantize:
        return "is in 4 bits, and a merged weight is not: --quantize=nf4 or .* --quantize=none"
    return "is in 4 bits already; leave --quantize out" if quantize and not merge else None


OPTIONS = {
    "source": ["folder", "packed", "m.gguf"],
    "to": ["new", "new.gguf"],
    "adapter": [None, "adapter"],
    "merge": [None, "true"],
    "quantize": [None, "nf4", "fp4", "none"],
    "kind": [None, "Q8_0", "F16"],
    "profile": [None, "peft"],
    "dtype": [None, "float32"],
}


def test_every_combination_of_options(script, folder, tmp_path, monkeypatch):
    """Works, or is refused before a weight is read; an error leaves nothing behind."""
    plain, packed = load(folder), tmp_path / "packed"
    params = lora.quantize(plain.params, "nf4", targets="q_proj")
    save_huggingface(packed, dataclasses.replace(plain, params=params))
    (tmp_path / "folder").symlink_to(folder)
    small_checkpoints.write_gguf(tmp_path / "m.gguf", *small_checkpoints.small("llama3_1"))
    (tmp_path / "adapter").mkdir()
    small_checkpoints.write_json(tmp_path / "adapter" / "adapter_config.json", {})

    def loading(source, **options):
        raise LoadingError

    monkeypatch.setattr(script, "load", loading)
    before = sorted(tmp_path.rglob("*"))
    worked = 0
    for values in itertools.product(*OPTIONS.values()):
        case = dict(zip(OPTIONS, values, strict=True))
        error = oracle(**case)
        given = {name: value for name, value in case.items() if value is not None}
        paths = {name: tmp_path / given[name] for name in ("to", "adapter") if name in given}
        arguments = given | paths | {"from": tmp_path / given.pop("source")}
        del arguments["source"]
        with pytest.raises(LoadingError if error is None else ValueError) as caught:
            run(script, **arguments)
        if error is not None:
            assert re.search(error.replace("=...", "=.*"), str(caught.value)), (case, caught.value)
        worked += error is None
    assert worked == 58 and sorted(tmp_path.rglob("*")) == before


WRONG = [
    ({"to": "x"}, "--from and --to are both needed"),
    ({"from": "folder", "to": ""}, "--from and --to are both needed"),
    ({"from": "folder", "to": "x", "adapter": ""}, "--adapter is empty"),
    ({"from": "folder", "to": "x", "check_base": "false"}, "--check_base is of an --adapter"),
    ({"from": "folder", "to": "folder"}, "folder exists: choose another --to"),
    ({"from": "folder", "to": "dangling"}, "dangling exists: choose another --to"),
    (
        {"from": "folder", "to": "x.safetensors"},
        r"looks like a \.safetensors file",
    ),
    ({"from": "folder", "to": "x.bin"}, r"looks like a \.bin file"),
    ({"from": "folder", "to": "file/x"}, "cannot be written: .*file is no folder"),
    ({"from": "nothing", "to": "x"}, "nothing' is no model here; expected 'smollm2-135m'"),
    ({"from": "no.gguf", "to": "x"}, r"no\.gguf: no such file"),
    ({"from": "empty", "to": "x"}, "has neither model.safetensors nor"),
    ({"from": "model.pth", "to": "x"}, "is a pickle"),
    ({"from": "folder", "to": "x", "adapter": "empty"}, "empty is no adapter: expected a folder"),
    ({"from": "folder", "to": "x", "adapter": "file"}, "file is no adapter: expected a folder"),
    (
        {"from": "folder", "to": "x", "adapter": "prompt", "merge": "true"},
        "is of PROMPT_TUNING, which no weight can take up: leave --merge out",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_commands(script, folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(script, "load", None)
    (tmp_path / "folder").symlink_to(folder)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    (tmp_path / "model.pth").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "prompt").mkdir()
    prompt = {"peft_type": "PROMPT_TUNING"}
    small_checkpoints.write_json(tmp_path / "prompt" / "adapter_config.json", prompt)
    before = sorted(tmp_path.rglob("*"))
    for name in {"from", "to", "adapter"} & arguments.keys():
        arguments = arguments | {name: arguments[name] and tmp_path / arguments[name]}
    with pytest.raises((ValueError, OSError), match=message):
        run(script, **arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_adapter_of_another_base_names_the_option(script, folder, tmp_path):
    model = load(folder)
    delta = cases.llama_delta(model.params, lora.LoRA(rank=2), size=0.03)
    other = jax.tree.map(lambda x: x * 1.5, model.params)
    peft.save_adapter(tmp_path / "adapter", delta, other, peft.model_names(model.config))
    whole = {"from": folder, "adapter": tmp_path / "adapter", "to": tmp_path / "new"}
    with pytest.raises(ValueError, match="--nocheck_base takes this one"):
        run(script, **whole)
    assert not (tmp_path / "new").exists()
    assert "an adapter" in run(script, **whole, check_base="false")["written"]


def texts(path: Path) -> list[str]:
    """The strings of a file but for its docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
    return [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) if type(n.value) is str]


def test_messages_name_options_that_exist(script):
    """The command its own and absl's; what it calls in the library, pip's alone."""
    option = re.compile(r"(?<![\w-])--(?:no)?([a-z]\w*(?:[.-]\w+)*)")
    ours = set(flags.FLAGS) | {"help"}
    named = {name for text in texts(ROOT / "scripts" / SCRIPT) for name in option.findall(text)}
    assert {"from", "to", "adapter", "merge", "quantize"} <= named <= ours
    pip = {"dry-run", "quiet", "no-deps", "deps", "ignore-installed", "retries", "report"}
    for folder in ("interop", "quant"):
        for path in (ROOT / "lora_jax" / folder).rglob("*.py"):
            found = {name for text in texts(path) for name in option.findall(text)}
            assert found <= (pip if path.name == "fetch.py" else set()), (path, found)
