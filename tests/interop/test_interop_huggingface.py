"""Hugging Face folders: parity of what is loaded, and one clear error for each broken folder."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small_checkpoints
import small_llamas
from small_checkpoints import write_json

from lora_jax.data import byte_tokenizer
from lora_jax.interop import load_huggingface
from lora_jax.models import llama
from lora_jax.models.config import RopeScaling

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "llama_logits.npz")


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path, "llama2")


def write(tmp_path: Path, name: str, *, shards: int = 1, **changes) -> Path:
    config, weights = small_checkpoints.small(name)
    return small_checkpoints.write_huggingface(
        tmp_path / "small", config | changes, weights, shards=shards
    )


@pytest.mark.sampled
@pytest.mark.parametrize("name", small_llamas.VARIANTS)
def test_logits_and_greedy_tokens_agree_with_transformers(tmp_path, name):
    """Each of the fifty tokens is the likeliest after those before it."""
    model = load_huggingface(write(tmp_path, name))
    tokens, greedy = small_llamas.TOKENS, GOLDEN[f"{name}/greedy"]
    padded = np.pad(tokens, [(0, 0), (0, greedy.shape[1] - tokens.shape[1])])
    both = jnp.asarray(np.concatenate([padded, greedy]), jnp.int32)
    logits = np.asarray(llama.forward(model.params, both, model.config))
    error = np.abs(logits[:2, : tokens.shape[1]] - GOLDEN[name]).max()
    assert error <= 1e-4 * np.abs(GOLDEN[name]).max()
    start = small_llamas.PROMPT.shape[1]
    np.testing.assert_array_equal(logits[2:, start - 1 : -1].argmax(-1), greedy[:, start:])


def test_shards_hold_the_same_model(tmp_path, folder):
    (tmp_path / "other").mkdir()
    sharded = load_huggingface(write(tmp_path / "other", "llama2", shards=3))
    jax.tree.map(np.testing.assert_array_equal, sharded.params, load_huggingface(folder).params)


def test_bfloat16_weights(tmp_path):
    config, weights = small_checkpoints.small("smollm2")
    half = {name: weight.astype(ml_dtypes.bfloat16) for name, weight in weights.items()}
    folder = small_checkpoints.write_huggingface(tmp_path / "small", config, half)
    params = load_huggingface(folder, dtype=jnp.bfloat16).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    expected = half["model.layers.1.mlp.down_proj.weight"].T
    np.testing.assert_array_equal(params["layers"]["mlp"]["down_proj"][1], expected)


def test_rope_of_transformers_5(tmp_path):
    old = load_huggingface(write(tmp_path, "llama3_1")).config
    rope = small_llamas.VARIANTS["llama3_1"]["rope_scaling"] | {"rope_theta": 500_000.0}
    folder = write(tmp_path, "llama3_1", rope_scaling=None, rope_theta=None, rope_parameters=rope)
    assert load_huggingface(folder).config == old
    assert old.rope_scaling == RopeScaling(factor=8.0, original_context=16)


def test_redundant_tensors_are_ignored(tmp_path):
    config, weights = small_checkpoints.small("smollm2")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    model = load_huggingface(
        small_checkpoints.write_huggingface(tmp_path / "small", config, weights)
    )
    assert "lm_head" not in model.params


def test_no_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_huggingface(tmp_path)


def test_config_that_is_not_json(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_huggingface(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, r"model_type='gemma'; supported: 'llama', 'mistral', 'mi"),
        ({"model_type": ["llama"]}, r"unsupported model_type=\['llama'\]"),
        (
            {"model_type": "qwen2"},
            r"lacks 6 tensor\(s\): model\.layers\.0\.self_attn\.k_proj\.bias",
        ),
        ({"model_type": "qwen3"}, r"lacks 4 tensor\(s\): model\.layers\.0\.self_attn\.k_norm"),
        ({"attention_bias": True}, r"lacks 8 tensor\(s\): .*k_proj\.bias"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config="),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, r"RoPE scaling 'su' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, r"lacks low_freq_factor"),
        ({"rope_scaling": [1.0]}, r"the RoPE scaling is \[1\.0\], expected an object"),
        ({"rms_norm_eps": float("inf")}, r"rms_norm_eps is inf, expected a positive number"),
        ({"vocab_size": 80.5}, r"vocab_size is 80\.5, expected a count"),
        ({"hidden_size": "large"}, r"hidden_size is 'large', expected a positive number"),
        ({"num_hidden_layers": 3}, r"lacks 9 tensor\(s\): model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"holds 9 tensor\(s\): model\.layers\.1"),
        ({"intermediate_size": 100}, r"has shape \(112, 64\), but the config asks for \(100, 64\)"),
    ],
)
def test_unsupported_or_contradictory_config(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_huggingface(write(tmp_path, "llama2", **changes))


def test_tokenizer_of_a_larger_vocabulary(tmp_path, folder):
    byte_tokenizer().core.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    with pytest.raises(ValueError, match=r"tokenizer .* 259 tokens, .* vocabulary of 80"):
        load_huggingface(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors nor"):
        load_huggingface(folder)


@pytest.mark.parametrize("kept", [0, 5, 500, -1])
def test_truncated_weights(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or corrupt"):
        load_huggingface(folder)


def test_quantised_weights(tmp_path):
    config, weights = small_checkpoints.small("llama2")
    weights["lm_head.weight"] = weights["lm_head.weight"].astype(np.int8)
    folder = small_checkpoints.write_huggingface(tmp_path / "small", config, weights)
    with pytest.raises(ValueError, match=r"'lm_head\.weight' is I8, expected one of F64"):
        load_huggingface(folder)


def test_missing_shard(tmp_path):
    folder = write(tmp_path, "llama2", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks the shard model-00002-of-00002"):
        load_huggingface(folder)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "..", 3])
def test_index_that_leaves_the_folder(tmp_path, shard):
    folder = write(tmp_path, "llama2", shards=2)
    edit_index(folder, "lm_head.weight", shard)
    with pytest.raises(ValueError, match=r"expected a \.safetensors file in the folder itself"):
        load_huggingface(folder)


def test_index_that_names_the_wrong_shard(tmp_path):
    folder = write(tmp_path, "llama2", shards=2)
    edit_index(folder, "model.embed_tokens.weight", "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"which does not hold it"):
        load_huggingface(folder)


def edit_index(folder: Path, name: str, shard: object) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = shard
    path.write_text(json.dumps(index))
