"""Broken and hostile files end in an error of ours or in a model, never in anything else.

A crash ends the process, a hang the alarm's patience, a huge allocation meets the limit.
"""

import contextlib
import json
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import cases
import hostile
import jax
import numpy as np
import pytest
import small_checkpoints
import small_llamas
from safetensors.numpy import save_file

import lora_jax as lora
from lora_jax.data import render
from lora_jax.data.tokenizer import CHATML
from lora_jax.interop import load_gguf, load_huggingface, peft
from lora_jax.interop.gguf_header import read_header
from lora_jax.quant import to_bitsandbytes

FEW, MANY = 50, 400
MEMORY = 512 << 20  # bytes beyond what the process has; the models here have some kilobytes
PATIENCE = 60  # seconds for one case, which takes milliseconds
SMALL = small_llamas.VARIANTS["llama3_1"] | {
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
PACKED = SMALL | {"hidden_size": 64}
FILES = [
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
Case = Callable[[np.random.Generator], object]


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def survives(case: Case, count: int, named: str) -> int:
    """Runs `count` seeds; returns how many were refused, all by errors that hold `named`."""
    refused = 0
    with bounded():
        for seed in range(count):
            signal.alarm(PATIENCE)
            try:
                case(np.random.default_rng([seed, count]))
            except (ValueError, FileNotFoundError) as error:
                assert named in str(error), f"seed {seed}: a {type(error).__name__} of no file"
                refused += 1
            except BaseException as error:
                pytest.fail(f"seed {seed}: {type(error).__name__}: {str(error)[:200]}")
    return refused


def load_all(load: Callable, path: Path) -> None:
    tokenizer = load(path, place=lambda path, leaf: leaf.read()).tokenizer
    ids = tokenizer.encode("ab0 zz<s>\u00e9 12")
    assert all(0 <= token_id < 80 for token_id in ids)
    tokenizer.decode(ids)


counts = pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])


@counts
@pytest.mark.parametrize("name", FILES)
def test_folders(tmp_path, name, count):
    weights = small_llamas.draw_weights(SMALL)
    folder = small_checkpoints.write_huggingface(tmp_path / "bad", SMALL, weights, shards=2)
    small_checkpoints.write_json(folder / "generation_config.json", {"eos_token_id": [78]})
    if name == "generation_config.json":
        small_checkpoints.write_json(folder / "tokenizer_config.json", {"chat_template": "x"})
    good = (folder / name).read_bytes()
    load_all(load_huggingface, folder)

    def case(random):
        if name.endswith(".safetensors"):
            bad = hostile.safetensors_bytes(good, random)
        else:
            bad = hostile.json_bytes(json.loads(good), random)
        (folder / name).write_bytes(bad)
        load_all(load_huggingface, folder)

    assert survives(case, count, str(folder)) > count / 3


@counts
def test_gguf(tmp_path, count):
    path = tmp_path / "bad.gguf"
    small_checkpoints.write_gguf(path, SMALL, small_llamas.draw_weights(SMALL))
    good = path.read_bytes()
    head = min(info.offset for info in read_header(path).tensors.values())
    load_all(load_gguf, path)

    def case(random):
        path.write_bytes(hostile.mutate_bytes(good, random, head=head))
        load_all(load_gguf, path)

    assert survives(case, count, str(path)) > count / 3


@counts
def test_states_of_packed_weights(tmp_path, count):
    """bitsandbytes' JSON inside a tensor."""
    folder, weights = tmp_path / "bad", small_llamas.draw_weights(PACKED)
    dense = small_checkpoints.write_huggingface(tmp_path / "dense", PACKED, weights)
    base = lora.quantize(load_huggingface(dense).params, "nf4", targets="q_proj")
    layer = jax.tree.map(lambda x: x[0], base["layers"]["attn"]["q_proj"])
    name = "model.layers.0.self_attn.q_proj.weight"
    del weights[name]
    weights |= to_bitsandbytes(layer, name)
    state_name = f"{name}.quant_state.bitsandbytes__nf4"
    state = json.loads(weights[state_name].tobytes())
    load_all(load_huggingface, small_checkpoints.write_huggingface(folder, PACKED, weights))

    def case(random):
        weights[state_name] = np.frombuffer(hostile.json_bytes(state, random), np.uint8)
        save_file(weights, folder / "model.safetensors")
        load_all(load_huggingface, folder)

    assert survives(case, count, str(folder)) > count / 3


ADAPTERS = {
    "lora": {"q_proj": lora.LoRA(rank=2), "v_proj": lora.LoRA(rank=1, alpha=3)},
    "ia3": {"k_proj": lora.IA3(), "down_proj": lora.IA3(scales="input")},
    "vera": {"q_proj": lora.VeRA(rank=2)},
    "adalora": {"q_proj": lora.AdaLoRA(total_steps=5, rank=3, target_rank=2)},
    "prefix": {"k_proj": lora.Prefix(length=2)},
}


@pytest.mark.sampled
@counts
@pytest.mark.parametrize("method", ADAPTERS)
def test_adapters(tmp_path, method, count):
    config, params, _ = cases.llama_case()
    names, folder = peft.model_names(config), tmp_path / "bad"
    delta = cases.llama_delta(params, ADAPTERS[method])
    peft.save_adapter(folder, delta, params, names, num_kv_heads=config.num_kv_heads)
    shapes = jax.eval_shape(lambda: params)
    good = {file.name: file.read_bytes() for file in folder.iterdir()}

    def case(random):
        for name, data in good.items():
            (folder / name).write_bytes(data)
        if random.random() < 0.5:
            name, bad = "adapter_config.json", json.loads(good["adapter_config.json"])
            bad = hostile.json_bytes(bad, random)
        else:
            name = "adapter_model.safetensors"
            bad = hostile.safetensors_bytes(good[name], random)
        (folder / name).write_bytes(bad)
        peft.load_adapter(folder, shapes, names)

    assert survives(case, count, str(folder)) > count / 5


@counts
def test_templates(count):
    messages = [{"role": "user", "content": "hi"}]

    def case(random):
        render(hostile.template(CHATML, random), messages, bos_token="<s>")

    assert survives(case, count, "The chat template") > count / 3
