"""Gemma 2 against transformers, on small random weights: soft caps and windows shorter than the
texts, so that each of them counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_checkpoints

import lora_jax as lora
from lora_jax import models
from lora_jax.interop import load_huggingface, save_gguf, save_huggingface
from lora_jax.models import decoder
from lora_jax.models.generate import generate

VALUES = {
    "model_type": "gemma2",
    "vocab_size": 80,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "query_pre_attn_scalar": 3,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 2.0,
    "sliding_window": 5,
    "rms_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "cache_implementation": "hybrid",
}
TOKENS = np.random.default_rng(0).integers(0, 75, (2, 16))
# transformers 5.24: the first logits of the last position of each row, and a greedy continuation.
LOGITS = [
    [0.356117, -1.556752, -0.690943, -1.134250, -1.347243, -1.814076],
    [1.330782, 0.669927, -0.724401, 0.516832, 1.277722, -1.943576],
]
CONTINUED = [54, 54, 54, 54, 71, 71, 71, 71]


def weights_of(values):
    """Matrices of normal numbers, norms around zero, under transformers' names."""
    rng = np.random.default_rng(1)
    d, f, h = values["hidden_size"], values["intermediate_size"], values["head_dim"]
    q, k = values["num_attention_heads"] * h, values["num_key_value_heads"] * h
    shapes = {
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (k, d),
        "self_attn.v_proj": (k, d),
        "self_attn.o_proj": (d, q),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
        "pre_feedforward_layernorm": (d,),
        "post_feedforward_layernorm": (d,),
    }
    found = {"model.embed_tokens": (values["vocab_size"], d), "model.norm": (d,)}
    for layer in range(values["num_hidden_layers"]):
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}
    return {
        f"{name}.weight": (rng.normal(size=shape) * (0.4 if len(shape) == 2 else 0.2)).astype("f4")
        for name, shape in found.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_checkpoints.write_huggingface(
        tmp_path_factory.mktemp("gemma2") / "m", VALUES, weights_of(VALUES)
    )


@pytest.fixture(scope="module")
def model(folder):
    return load_huggingface(folder)


def logits_of(model):
    return np.asarray(models.forward(model.params, jnp.asarray(TOKENS), model.config))


def test_logits_and_tokens_recorded_from_transformers(model):
    np.testing.assert_allclose(logits_of(model)[:, -1, :6], LOGITS, rtol=2e-5, atol=2e-5)
    continued = generate(
        model.params,
        jnp.asarray(TOKENS[:1]),
        jnp.array([16]),
        model.config,
        max_new_tokens=8,
        eos_id=-1,
    )
    assert continued[0].tolist() == CONTINUED


def test_a_cache_and_packed_rows_see_what_a_row_alone_sees(model):
    whole = logits_of(model)
    cache = decoder.start_cache(model.params, model.config, 2, 16)
    parts = []
    for piece in np.split(TOKENS, [7, 8], axis=1):
        hidden, cache = decoder.extend(model.params, jnp.asarray(piece), cache, model.config)
        head = models.output_head(model.params)
        parts.append(model.config.family.read_out(hidden, head, model.config))
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-5)
    packed = models.forward(
        model.params,
        jnp.asarray(TOKENS).reshape(1, 32),
        model.config,
        positions=jnp.tile(jnp.arange(16), 2)[None],
        segment_ids=jnp.repeat(jnp.array([1, 2]), 16)[None],
    )
    np.testing.assert_allclose(packed.reshape(whole.shape), whole, rtol=1e-4, atol=1e-5)


def test_a_wider_window_and_other_caps_count(model):
    changes = {
        "windows": None,
        "attention_cap": None,
        "logit_cap": None,
        "attention_scalar": 8,
    }
    for name, value in changes.items():
        other = dataclasses.replace(model.config, **{name: value})
        forward = models.forward(model.params, jnp.asarray(TOKENS), other)
        assert np.abs(np.asarray(forward) - logits_of(model)).max() > 1e-3, name


@pytest.mark.parametrize("method", [lora.LoRA(rank=2), lora.DoRA(rank=2)])
def test_adapted_it_computes_what_merged_it_computes(model, method):
    base, delta = lora.lora_transform(model.params, method, key=jax.random.key(0))
    delta = jax.tree.map(lambda x: x + 0.05, delta)
    bound, merged = (
        models.forward(params, jnp.asarray(TOKENS), model.config)
        for params in (lora.bind(base, delta), lora.merge(base, delta))
    )
    np.testing.assert_allclose(bound, merged, rtol=1e-4, atol=1e-5)


def test_a_folder_comes_back(model, tmp_path):
    anew = dataclasses.replace(model, source="none")
    save_huggingface(tmp_path / "out", anew)
    again = load_huggingface(tmp_path / "out")
    assert again.config == model.config
    np.testing.assert_array_equal(logits_of(again), logits_of(model))
    with pytest.raises(ValueError, match="attention_scalar=3: llama.cpp takes 8"):
        save_gguf(tmp_path / "out.gguf", anew)


def test_random_params_have_the_tree_of_a_checkpoint(model):
    drawn = models.init(model.config, key=jax.random.key(0))
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, model.params)
    assert not np.any(drawn["norm"]) and models.SHAPES["gemma-2-2b"].family is model.config.family


def test_transformers_agrees(model, folder):
    torch = pytest.importorskip("torch", reason="requirements-parity.txt is not installed")
    transformers = pytest.importorskip("transformers", reason="requirements-parity.txt")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = theirs(torch.from_numpy(TOKENS)).logits.numpy()
        prompt = torch.from_numpy(TOKENS[:1])
        continued = theirs.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    np.testing.assert_allclose(logits_of(model), logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits[:, -1, :6], LOGITS, rtol=1e-5, atol=1e-5)
    assert continued[0, 16:].tolist() == CONTINUED
