"""What is written loads again to the same bits, and nothing is overwritten or half written."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_checkpoints
import small_llamas

import lora_jax as lora
from lora_jax.interop import (
    Pretrained,
    load_gguf,
    load_huggingface,
    save_gguf,
    save_huggingface,
)
from lora_jax.interop.gguf_header import read_header
from lora_jax.models import llama


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def small_model(tmp_path: Path, name: str = "smollm2", **options) -> Pretrained:
    folder = small_checkpoints.write_huggingface(
        tmp_path / "source", *small_checkpoints.small(name)
    )
    return load_huggingface(folder, **options)


def assert_same(here: Pretrained, there: Pretrained) -> None:
    assert here.config == there.config
    jax.tree.map(np.testing.assert_array_equal, here.params, there.params)
    for field in ("bos_id", "eos_id", "pad_id", "chat_template"):
        assert getattr(here.tokenizer, field) == getattr(there.tokenizer, field)
    assert here.tokenizer.encode("abz<s>") == there.tokenizer.encode("abz<s>")


@pytest.mark.parametrize("name", small_llamas.VARIANTS)
def test_round_trip_of_a_folder(tmp_path, name):
    model = small_model(tmp_path, name)
    save_huggingface(tmp_path / "out", model)
    assert_same(load_huggingface(tmp_path / "out"), model)
    tied = model.config.tie_embeddings
    assert read(tmp_path / "out", "config.json")["tie_word_embeddings"] == tied
    assert not list(tmp_path.glob(".*"))


def test_round_trip_in_bfloat16_and_shards(tmp_path):
    model = small_model(tmp_path, "llama2", dtype=jnp.bfloat16)
    save_huggingface(tmp_path / "out", model, shard_bytes=50_000)
    assert_same(load_huggingface(tmp_path / "out", dtype=jnp.bfloat16), model)
    shards = sorted(tmp_path.glob("out/*.safetensors"))
    index = read(tmp_path / "out", "model.safetensors.index.json")
    assert sorted(set(index["weight_map"].values())) == [shard.name for shard in shards]
    assert len(shards) > 2 and all(shard.stat().st_size < 53_000 for shard in shards)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(model.params))


@pytest.mark.parametrize("name", ["llama3_1", "qwen2", "qwen3"])
def test_a_gguf_becomes_a_folder(tmp_path, name):
    """Whose config, tokenizer and generation config are written anew."""
    model = load_gguf(
        small_checkpoints.write_gguf(tmp_path / "m.gguf", *small_checkpoints.small(name))
    )
    template = "{{ messages[0]['content'] }}"
    tokenizer = dataclasses.replace(model.tokenizer, chat_template=template)
    model = dataclasses.replace(model, tokenizer=tokenizer)
    save_huggingface(tmp_path / "out", model)
    assert_same(load_huggingface(tmp_path / "out"), model)
    ids = {"bos_token_id": 77, "eos_token_id": 78, "pad_token_id": 79}
    assert read(tmp_path / "out", "generation_config.json") == ids


def test_what_stands_beside_the_weights_travels(tmp_path):
    model = small_model(tmp_path)
    source, more = tmp_path / "source", {"temperature": 0.6, "eos_token_id": [78, 79]}
    small_checkpoints.write_json(source / "generation_config.json", more)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "run_me.py").write_text("")
    changed = read(source, "config.json") | {"auto_map": {"AutoModel": "run_me.M"}, "use_cache": 1}
    small_checkpoints.write_json(source / "config.json", changed)
    save_huggingface(tmp_path / "out", model, dtype=jnp.float16)
    assert read(tmp_path / "out", "generation_config.json") == more
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    config = read(tmp_path / "out", "config.json")
    assert config["use_cache"] == 1 and config["torch_dtype"] == "float16"
    assert "auto_map" not in config and not (tmp_path / "out" / "run_me.py").exists()


def test_a_model_of_another_shape_gets_a_config_of_its_own(tmp_path):
    model = small_model(tmp_path)
    longer = jnp.concatenate([model.params["embed"]] * 2)
    config = dataclasses.replace(model.config, vocab_size=160)
    params = model.params | {"embed": longer}
    save_huggingface(tmp_path / "out", dataclasses.replace(model, params=params, config=config))
    assert load_huggingface(tmp_path / "out").config == config


def test_nothing_is_overwritten(tmp_path):
    model = small_model(tmp_path)
    (tmp_path / "empty").mkdir()
    save_huggingface(tmp_path / "empty", model)
    before = {path.name: path.stat() for path in (tmp_path / "empty").iterdir()}
    with pytest.raises(ValueError, match=r"empty exists already and is never overwritten"):
        save_huggingface(tmp_path / "empty", model)
    assert {path.name: path.stat() for path in (tmp_path / "empty").iterdir()} == before


def test_overflow_leaves_nothing_behind(tmp_path):
    model = small_model(tmp_path)
    params = model.params | {"norm": jnp.full_like(model.params["norm"], 1e5)}
    with pytest.raises(ValueError, match=r"model\.norm\.weight .* float16 cannot.* 1e\+05"):
        save_huggingface(
            tmp_path / "out", dataclasses.replace(model, params=params), dtype=jnp.float16
        )
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_only_plain_params_of_the_config_are_written(tmp_path):
    model = small_model(tmp_path)

    def save(params, message):
        with pytest.raises(ValueError, match=message):
            save_huggingface(tmp_path / "out", dataclasses.replace(model, params=params))

    adapted = jax.eval_shape(
        lambda p: lora.bind(*lora.lora_transform(p, lora.LoRA(), key=jax.random.key(0))),
        model.params,
    )
    weight = adapted["layers"]["attn"]["k_proj"]
    layers = model.params["layers"]
    layers = {**layers, "attn": {**layers["attn"], "k_proj": weight}}
    save(
        {**model.params, "layers": layers},
        r"layers/attn/k_proj is .*merge adapters and dequantise first",
    )
    save({**model.params, "head": model.params["norm"]}, r"missing \[\], unexpected \['head'\]")
    save({**model.params, "norm": model.params["norm"][1:]}, r"norm has shape \(71,\)")


def half(tree):
    """Values that float16 holds exactly."""
    return jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), tree)


@pytest.mark.parametrize("name", small_llamas.VARIANTS)
def test_round_trip_of_a_gguf_in_f16(tmp_path, name):
    """Vectors stay float32; of the matrices all bits of float16 survive."""
    model = small_model(tmp_path, name)
    model = dataclasses.replace(model, params=half(model.params))
    save_gguf(tmp_path / "m.gguf", model)
    again = load_gguf(tmp_path / "m.gguf")
    assert again.name == "m" and not list(tmp_path.glob(".*"))
    assert_same(again, model)


def test_q8_0_is_within_half_a_step_of_its_blocks(tmp_path):
    model = small_model(tmp_path, "llama2")
    save_gguf(tmp_path / "m.gguf", model, kind="Q8_0")
    info = read_header(tmp_path / "m.gguf").tensors
    kinds = {name.removesuffix(".weight"): tensor.kind.name for name, tensor in info.items()}
    # 112 columns do not fill blocks of 32.
    assert (kinds["blk.0.attn_q"], kinds["blk.0.ffn_down"]) == ("Q8_0", "F16")
    assert (kinds["output"], kinds["output_norm"]) == ("Q8_0", "F32")
    loaded = load_gguf(tmp_path / "m.gguf").params["lm_head"].T.reshape(80, 2, 32)
    exact = model.params["lm_head"].T.reshape(80, 2, 32)
    step = np.abs(exact).max(-1, keepdims=True) / 127
    assert (np.abs(loaded - exact) <= step * (0.5 + 127 / 2048)).all()  # its scale is a float16


def test_gguf_refuses(tmp_path):
    model = small_model(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"mine")

    def save(message, path="other.gguf", kind="F16", **changes):
        with pytest.raises(ValueError, match=message):
            save_gguf(tmp_path / path, dataclasses.replace(model, **changes), kind=kind)

    save(r"m\.gguf exists already and is never overwritten", path="m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == b"mine"
    save(r"kind='Q4_K': expected one of F16, Q8_0", kind="Q4_K")
    large = model.params | {"embed": jnp.full_like(model.params["embed"], 1e5)}
    save(r"token_embd\.weight holds values that float16 cannot", params=large)
    odd = dataclasses.replace(model.config, qkv_bias=True, qk_norm=True)
    attn = jax.eval_shape(lambda: llama.init(odd, key=jax.random.key(0)))["layers"]["attn"]
    attn = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), attn)
    layers = model.params["layers"] | {"attn": attn}
    save(
        r"no family has qkv_bias=True, o_bias=False, .* qk_norm=True",
        params=model.params | {"layers": layers},
        config=odd,
    )
    assert {path.name for path in tmp_path.iterdir()} == {"source", "m.gguf"}
