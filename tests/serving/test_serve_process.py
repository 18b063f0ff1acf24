"""scripts/serve.py as a process, over a small model in a folder: killed, and on several devices."""

import dataclasses
import json
from pathlib import Path

import pytest
import serving_models
from test_loaded_adapters import killed_in_the_middle, process

from lora_jax.interop import peft, save_huggingface
from scripts import serve

CONFIG = dataclasses.replace(serving_models.LLAMA, hidden_size=64, head_dim=32, vocab_size=264,
                             intermediate_size=128, num_heads=4, num_kv_heads=4,
                             context_length=128)  # fmt: skip
SIZES = ["--rows=4", "--pages=64", "--max-length=96", "--chunk=16", "--slots=2"]
SCRIPT = Path(serve.__file__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, three adapters of it, and one outside of their folder."""
    folder = tmp_path_factory.mktemp("served")
    model = serving_models.model_of(CONFIG)
    save_huggingface(folder / "model", model)
    names = peft.model_names(CONFIG)
    for name, delta in serving_models.adapters_of(model, 4).items():
        parent = folder if name == "a3" else folder / "adapters"
        peft.save_adapter(parent / name, delta, model.params, names, num_kv_heads=4)
    return folder


@pytest.fixture
def command(folder, monkeypatch):
    cache = Path(__file__).parents[2] / ".pytest_cache"
    monkeypatch.setenv("LORA_JAX_CACHE", str(cache))
    return [SCRIPT, f"--model={folder / 'model'}", *SIZES]


@pytest.mark.slow
def test_a_server_that_is_killed_answers_as_before(folder, command):
    killed_in_the_middle(folder / "adapters", folder / "a3", command)


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [[], ["--quantize=nf4"]], ids=["float32", "nf4"])
def test_mode_tensor_answers_as_one_device(folder, command, quantized, monkeypatch):
    def answers(*flags):
        with process(folder / "adapters", *command, *quantized, *flags) as (_, client):
            models = [card["id"] for card in json.loads(client.get("/v1/models"))["data"]]
            asked = [
                {"model": model, "prompt": f"{model} is", "max_tokens": 12, "temperature": 0}
                for model in models
            ]
            for body in asked:
                client.whole(body)
            assert not client.tally.wrong
            return client.tally.answers

    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    alone = answers()
    assert len({str(answer) for answer in alone.values()}) > 2
    assert answers("--parallel=tensor") == alone


@pytest.mark.parametrize("mode", ["fsdp", "fsdp+tensor", "pmap", "data", ""])
def test_modes_that_are_not_for_serving(mode, capsys):
    assert serve.main([f"--parallel={mode}", "--model=none", "--port=0"]) == 1
    error = capsys.readouterr().err
    assert f"mode {mode!r}" in error and "tensor" in error and "Traceback" not in error
