"""The README's Python is run as it stands there, block after block."""

import re
from pathlib import Path

import jax
import pytest

from lora_jax.data import byte_tokenizer
from lora_jax.interop import Pretrained
from lora_jax.models import SHAPES, llama

README = Path(__file__).parents[1] / "README.md"


def tiny_model(source):
    """In the place of a download."""
    assert source == "smollm2-135m"
    params = llama.init(SHAPES["tiny"], key=jax.random.key(0))
    return Pretrained(
        params=params,
        config=SHAPES["tiny"],
        tokenizer=byte_tokenizer(),
        name=source,
        source="random weights",
    )


@pytest.mark.mixed_dtypes
def test_blocks_run_in_order(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lora_jax.interop.load", tiny_model)
    blocks = re.findall(r"<!-- test: (.+?) -->\n```python\n(.*?)```", README.read_text(), re.S)
    names = [
        "custom step",
        "pretrained",
        "targets",
        "methods",
        "sweep",
        "rows",
        "qlora",
        "flax",
        "mesh",
        "pmap",
        "own loss",
        "peft",
        "serving",
    ]
    assert [name for name, _ in blocks] == names
    assert README.read_text().count("```python") == len(blocks)
    scope: dict = {}
    for name, code in blocks:
        exec(compile(code, f"README.md, {name}", "exec"), scope)
    printed = capsys.readouterr().out
    assert "trainable params: 16,384" in printed
    assert "NF4(2x64x128 float32, blocks of 64, absmax in 8 bits, 4." in printed
    assert scope["value"] < 5.0
    assert scope["reply"].shape == (1, 20)
    assert scope["losses"].shape == (3,)
    assert scope["weights"]["embed"].shape == (320, 64)
    assert scope["logits"].shape == (2, 6, 100)
    assert scope["loss_before"].sharding.mesh.size == scope["count"] == 8
    assert scope["metrics"].loss < 6.5
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert scope["engine"].stats()["finished"] == 2 and scope["pool"].resident == ("mine",)
    assert scope["half"]["layers"]["attn"]["q_proj"].rank == 8
