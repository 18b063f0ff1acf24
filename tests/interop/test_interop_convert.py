"""`scripts/convert.py`, from one format to the next, on a small model."""

import importlib.util
import json
from pathlib import Path

import cases
import jax
import numpy as np
import pytest
import small_checkpoints
import small_llamas
from absl import flags

import lora_jax as lora
from lora_jax.interop import load, peft, quantized
from lora_jax.models import llama

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert.py"
TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("convert", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    peft.save_adapter(adapter, delta, model.params, peft.llama_names(model.config))
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
    cases.assert_equal(found.params, params)
    again = run(script, **{"from": tmp_path / "nf4"}, to=tmp_path / "again")
    assert again["model"].partition(",")[2] == said["model"].partition(",")[2]
    cases.assert_equal(load(tmp_path / "again").params, params)

    delta = cases.llama_delta(found.params, lora.LoRA(rank=2), size=0.03, targets="attention")
    names = peft.llama_names(found.config)
    peft.save_adapter(tmp_path / "adapter", delta, found.params, names)
    whole = {"from": tmp_path / "nf4", "adapter": tmp_path / "adapter", "merge": True}
    run(script, **whole, to=tmp_path / "merged", quantize="fp4")
    merged = lora.quantize(lora.dequantize(lora.merge(params, delta)), "fp4")
    cases.assert_equal(load(tmp_path / "merged").params, merged)

    with pytest.raises(ValueError, match="is in nf4 already; leave --quantize out"):
        run(script, **{"from": tmp_path / "nf4"}, to=tmp_path / "x", quantize="fp4")
    with pytest.raises(ValueError, match=r"merge\(base, delta\) and dequantize\(params\)"):
        run(script, **{"from": tmp_path / "nf4"}, to=tmp_path / "m.gguf")
    for more in ({"to": tmp_path / "m.gguf"}, {"to": tmp_path / "x", "adapter": tmp_path}):
        with pytest.raises(ValueError, match="--quantize needs a --to that is a model's"):
            run(script, **{"from": folder}, quantize="nf4", **more)


def test_wrong_commands(script, folder, tmp_path):
    with pytest.raises(ValueError, match="--from and --to are both needed"):
        run(script, **{"from": folder})
    with pytest.raises(ValueError, match="--merge needs an --adapter"):
        run(script, **{"from": folder}, to=tmp_path / "x", merge=True)
    with pytest.raises(FileExistsError, match="exists: choose another --to"):
        run(script, **{"from": folder}, to=tmp_path)
