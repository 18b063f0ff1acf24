"""Every key of a checkpoint's config is read, known to change nothing, or refused by name."""

import dataclasses

import config_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_checkpoints
import small_llamas

from lora_jax.interop import load_gguf, load_huggingface, save_gguf, save_huggingface
from lora_jax.interop.huggingface_config import config_from_huggingface
from lora_jax.models import llama


def write(folder, name, changes, weights=None):
    config, drawn = small_checkpoints.small(name)
    return small_checkpoints.write_huggingface(folder, config | changes, weights or drawn)


@pytest.mark.parametrize(("name", "changes"), config_cases.HARMLESS)
def test_harmless_keys_change_nothing(tmp_path, name, changes):
    plain = config_from_huggingface(write(tmp_path / "plain", name, {}))
    assert load_huggingface(write(tmp_path / "changed", name, changes)).config == plain


@pytest.mark.parametrize(("name", "changes", "message"), config_cases.REFUSED)
def test_what_would_compute_something_else_is_refused(tmp_path, name, changes, message):
    with pytest.raises(ValueError, match=rf"small.*{message}"):
        load_huggingface(write(tmp_path / "small", name, changes))


def test_an_unknown_key_says_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"unknown a=1, b=.* remove it from config\.json, or set"):
        load_huggingface(write(tmp_path / "small", "llama2", {"a": 1, "b": [2] * 99}))


@pytest.mark.parametrize(("name", "changes", "windows"), config_cases.WINDOWED)
def test_windows_of_layers(tmp_path, name, changes, windows):
    """Through a folder that is written anew, too."""
    plain = config_from_huggingface(write(tmp_path / "plain", name, {}))
    model = load_huggingface(write(tmp_path / "windowed", name, changes))
    context = 12 if name == "llama2" else 64
    assert model.config == dataclasses.replace(plain, context_length=context, windows=windows)
    save_huggingface(tmp_path / "out", dataclasses.replace(model, source="none"))
    assert load_huggingface(tmp_path / "out").config == model.config


def test_a_window_is_slid_by_every_way_to_read(tmp_path):
    """And a GGUF's context, which llama.cpp attends to in full, is the window."""
    model = load_huggingface(write(tmp_path / "small", "mistral", {"sliding_window": 12}))
    full = dataclasses.replace(model.config, windows=None)
    tokens = jnp.asarray(small_llamas.TOKENS, jnp.int32)
    forward = jax.jit(llama.forward, static_argnums=2)
    within, beyond = (
        np.abs(forward(model.params, tokens, model.config) - forward(model.params, tokens, full))
    )[:, [11, 12]].max(axis=(0, 2))
    assert within == 0 and beyond > 1e-3
    save_gguf(tmp_path / "m.gguf", model)
    found = load_gguf(tmp_path / "m.gguf").config
    assert found == dataclasses.replace(model.config, context_length=12)


def test_a_head_that_differs_from_the_embedding_is_kept(tmp_path):
    """Whatever the config says of ties, as in transformers 5; one equal to it is the embedding."""
    config, weights = small_checkpoints.small("llama2")
    untied = load_huggingface(write(tmp_path / "untied", "llama2", {}))
    tie = {"tie_word_embeddings": True}
    model = load_huggingface(write(tmp_path / "both", "llama2", tie))
    assert model.config == untied.config
    np.testing.assert_array_equal(model.params["lm_head"], untied.params["lm_head"])
    save_huggingface(tmp_path / "out", model)
    assert load_huggingface(tmp_path / "out").config == untied.config

    equal = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
    almost = equal | {"lm_head.weight": equal["lm_head.weight"].copy()}
    almost["lm_head.weight"][-1, -1] += 1e-3
    assert load_huggingface(write(tmp_path / "equal", "llama2", tie, equal)).config.tie_embeddings
    found = load_huggingface(write(tmp_path / "almost", "llama2", tie, almost))
    assert not found.config.tie_embeddings

    alone = {name: x for name, x in weights.items() if "embed" not in name}
    head = load_huggingface(write(tmp_path / "alone", "llama2", tie, alone))
    np.testing.assert_array_equal(head.params["embed"], weights["lm_head.weight"])
    with pytest.raises(ValueError, match=r"lacks 1 tensor\(s\): model\.embed_tokens"):
        load_huggingface(write(tmp_path / "neither", "llama2", {}, alone))


@pytest.mark.parametrize("name", small_llamas.VARIANTS)
def test_tensors_without_their_prefix(tmp_path, name):
    _, weights = small_checkpoints.small(name)
    bare = {key.removeprefix("model."): x for key, x in weights.items()}
    here = load_huggingface(write(tmp_path / "bare", name, {}, bare))
    there = load_huggingface(write(tmp_path / "whole", name, {}))
    assert here.config == there.config
    jax.tree.map(np.testing.assert_array_equal, here.params, there.params)
    twice = weights | {"norm.weight": weights["model.norm.weight"]}
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' twice, with and without"):
        load_huggingface(write(tmp_path / "twice", name, {}, twice))
    other = {f"transformer.{key}": x for key, x in weights.items()}
    with pytest.raises(ValueError, match=r"lacks \d+ tensor"):
        load_huggingface(write(tmp_path / "other", name, {}, other))


GGUF_HARMLESS = [
    {"llama.vocab_size": 80},
    {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
    {"llama.rope.scaling.type": "linear"},
    {"llama.rope.scaling.factor": 1.0},
    {"llama.rope.dimension_count": 16},
    {"llama.attention.value_length": 16},
    {"llama.attention.causal": True},
    {"llama.attention.scale": 0.25},
    {"llama.attention.sliding_window": 0},
    {"llama.expert_count": 0},
    {"llama.tensor_data_layout": "Meta AI original pth"},
    {"qwen2.rope.scaling.factor": 4.0},
    {"general.author": "x", "general.type": "model"},
    {"tokenizer.ggml.eot_token_id": 78, "tokenizer.ggml.add_space_prefix": False},
]
GGUF_REFUSED = [
    ({"llama.rope.scaling.factor": 4.0}, r"rope\.scaling\.factor is 4\.0; supported: 0, 1"),
    ({"llama.rope.scaling.type": "longrope"}, r"rope\.scaling\.type is 'longrope'"),
    ({"llama.rope.scale_linear": 4.0}, r"rope\.scale_linear is 4\.0"),
    ({"llama.rope.scaling.type": "yarn"}, r"'yarn' has the factor 0\.0 and the original"),
    ({"llama.rope.scaling.attn_factor": 2.0}, r"attn_factor is 2\.0"),
    ({"llama.rope.scaling.yarn_beta_fast": 2.0}, r"yarn_beta_fast \(2\.0\) is not known"),
    ({"llama.rope.dimension_count": 8}, r"rope\.dimension_count is 8; supported: 16"),
    ({"llama.rope.freq_base_swa": 1e4}, r"freq_base_swa .* is not known"),
    ({"llama.attention.causal": False}, r"attention\.causal is False"),
    ({"llama.attention.scale": 1.0}, r"attention\.scale is 1\.0"),
    ({"llama.attention.value_length": 8}, r"value_length is 8; supported: 16"),
    ({"llama.attention.clamp_kqv": 8.0}, r"clamp_kqv is 8\.0"),
    ({"llama.attention.sliding_window_pattern": 2}, r"sliding_window_pattern .* is not known"),
    ({"llama.attn_logit_softcapping": 30.0}, r"attn_logit_softcapping is 30\.0"),
    ({"llama.final_logit_softcapping": 30.0}, r"final_logit_softcapping is 30\.0"),
    ({"llama.logit_scale": 0.5}, r"logit_scale is 0\.5"),
    ({"llama.residual_scale": 0.5}, r"residual_scale is 0\.5"),
    ({"llama.embedding_scale": 2.0}, r"embedding_scale is 2\.0"),
    ({"llama.expert_count": 8}, r"expert_count is 8"),
    ({"llama.leading_dense_block_count": 1}, r"not known, and may change what the model computes"),
    ({"general.type": "adapter"}, r"holds a 'adapter', expected a 'model'"),
    ({"split.count": 3}, r"one of 3 parts of a model; join them"),
    ({"tokenizer.ggml.precompiled_charsmap": "x"}, r"may change how a text is split"),
    ({"tokenizer.ggml.remove_extra_whitespaces": True}, r"extra_whitespaces is not supported"),
]


@pytest.mark.parametrize("more", GGUF_HARMLESS)
def test_harmless_keys_of_a_gguf_change_nothing(tmp_path, more):
    small = small_checkpoints.small("llama2")
    plain = load_gguf(small_checkpoints.write_gguf(tmp_path / "plain.gguf", *small))
    found = load_gguf(small_checkpoints.write_gguf(tmp_path / "m.gguf", *small, more=more))
    assert found.config == plain.config


@pytest.mark.parametrize(("more", "message"), GGUF_REFUSED)
def test_keys_of_a_gguf_that_would_compute_something_else(tmp_path, more, message):
    path = small_checkpoints.write_gguf(
        tmp_path / "m.gguf", *small_checkpoints.small("llama2"), more=more
    )
    with pytest.raises(ValueError, match=rf"m\.gguf.*{message}"):
        load_gguf(path)


def test_a_window_of_a_gguf(tmp_path):
    more = {"llama.attention.sliding_window": 12}
    small = small_checkpoints.small("mistral")
    found = load_gguf(small_checkpoints.write_gguf(tmp_path / "m.gguf", *small, more=more)).config
    assert (found.context_length, found.windows) == (64, (12, 12))


def test_rope_factors_count_in_a_llama_alone(tmp_path):
    config, weights = small_checkpoints.small("qwen2")
    config = config | {"rope_scaling": config_cases.ROPE}
    path = small_checkpoints.write_gguf(tmp_path / "m.gguf", config, weights)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight, which llama\.cpp does not read in"):
        load_gguf(path)


def test_a_tokenizer_one_token_larger_or_smaller(tmp_path):
    """Its added token is refused in a text, and left out of a GGUF."""
    folder = write(tmp_path / "small", "llama2", {})
    core = small_checkpoints.small_tokenizer()
    core.add_special_tokens(["<more>"])
    core.save(str(folder / "tokenizer.json"))
    small_checkpoints.write_json(
        folder / "tokenizer_config.json",
        small_checkpoints.TOKENIZER_CONFIG | {"pad_token": "<more>"},
    )
    model = load_huggingface(folder)
    assert model.tokenizer.vocab_size == 80 and model.tokenizer.pad_id is None
    assert model.tokenizer.encode("ab") == [76]
    with pytest.raises(ValueError, match="'<more>', id 80, .* embedding has 80 rows"):
        model.tokenizer.encode("ab<more>")
    save_huggingface(tmp_path / "out", model)
    assert load_huggingface(tmp_path / "out").tokenizer.num_rows == 80

    config, weights = small_checkpoints.small("llama2")
    weights |= {
        name: np.concatenate([weights[name]] * 2)
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    larger = write(tmp_path / "larger", "llama2", {"vocab_size": 160}, weights)
    assert load_huggingface(larger).tokenizer.num_rows is None


def test_folders_of_version_0_1_0_still_load(tmp_path):
    """The keys that it wrote."""
    written = {
        "rope_scaling": None,
        "bos_token_id": 77,
        "eos_token_id": 78,
        "pad_token_id": 79,
        "torch_dtype": "float32",
        "head_dim": 16,
    }
    assert load_huggingface(write(tmp_path / "small", "llama2", written)).config.head_dim == 16


@pytest.mark.parametrize("rows", [77, 78, 96])
def test_resized_vocabularies(tmp_path, rows):
    """Rows beyond the tokenizer's tokens, or fewer than them: as they are through both formats."""
    config, weights = small_checkpoints.small("llama2")
    weights |= {
        name: np.concatenate([weights[name]] * 2)[:rows]
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    folder = write(tmp_path / "small", "llama2", {"vocab_size": rows}, weights)
    if rows < 79:  # without its beginning or its end, a text cannot be told apart
        lost = "bos_id is 77" if rows < 78 else "eos_id is 78"
        with pytest.raises(ValueError, match=rf"{lost}, outside .* without resizing"):
            load_huggingface(folder)
        return
    model = load_huggingface(folder)
    save_gguf(tmp_path / "m.gguf", model)
    save_huggingface(tmp_path / "out", load_gguf(tmp_path / "m.gguf"))
    for found in (model, load_gguf(tmp_path / "m.gguf"), load_huggingface(tmp_path / "out")):
        assert found.config.vocab_size == rows and found.params["embed"].shape[0] == rows
        assert found.tokenizer.encode("ab") == [76]
        assert isinstance(found.tokenizer.decode([76, rows - 1]), str)
