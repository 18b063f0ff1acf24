"""GGUF files: parity of what is loaded, and one clear error for each kind of broken file."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_checkpoints
import small_llamas

import lora_jax as lora
from lora_jax.interop import load_gguf, load_huggingface, quantized
from lora_jax.interop.gguf_header import read_header
from lora_jax.models import llama
from lora_jax.models.config import RopeScaling


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return small_checkpoints.write_gguf(path, *small_checkpoints.small("llama3_1"))


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", small_llamas.VARIANTS)
def test_params_equal_those_of_the_huggingface_folder(tmp_path, name):
    """Whose logits agree with transformers, by the tests beside this one."""
    small = small_checkpoints.small(name)
    here = load_gguf(small_checkpoints.write_gguf(tmp_path / "m.gguf", *small))
    there = load_huggingface(small_checkpoints.write_huggingface(tmp_path / "folder", *small))
    assert here.config == there.config
    jax.tree.map(np.testing.assert_array_equal, here.params, there.params)


def test_leaves_are_quantised_as_they_are_read(whole):
    model, plain = load_gguf(whole, place=quantized("nf4", block_size=16)), load_gguf(whole)
    expected = lora.quantize(plain.params, "nf4", block_size=16)
    assert jax.tree.structure(model.params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, model.params, expected)


def test_config_and_tree(whole):
    model = load_gguf(whole, dtype=jnp.bfloat16)
    assert model.config.rope_scaling == RopeScaling(factor=8.0, original_context=16)
    assert model.config.norm_eps == 1e-5
    assert model.params["layers"]["attn"]["k_proj"].shape == (2, 64, 32)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}
    expected = jax.eval_shape(lambda: llama.init(model.config, key=jax.random.key(0)))
    assert jax.tree.map(jnp.shape, model.params) == jax.tree.map(jnp.shape, expected)
    assert model.name == "small" and model.source == str(whole)


def test_quantised_tensors_are_dequantised(tmp_path):
    config, weights = small_checkpoints.small("llama2")
    name = "lm_head.weight"
    path = small_checkpoints.write_gguf(tmp_path / "m.gguf", config, weights, q8=(name,))
    loaded, exact = np.asarray(load_gguf(path).params["lm_head"]), weights[name].T
    assert 0 < np.abs(loaded - exact).max() < np.abs(exact).max() / 127


@pytest.mark.parametrize("kept", [0, 3, 20, 100, 1000, 3000, 20_000])
def test_truncated(whole, tmp_path, kept):
    path = write(tmp_path, whole.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"broken\.gguf (is not a GGUF file|is truncated)"):
        load_gguf(path)


def test_last_byte_missing(whole, tmp_path):
    data = whole.read_bytes()
    info = list(read_header(whole).tensors.values())[-1]
    path = write(tmp_path, data[: info.offset + info.num_bytes - 1])
    with pytest.raises(ValueError, match=r"truncated or corrupt: the tensor .* past the end"):
        load_gguf(path)


def test_wrong_magic(whole, tmp_path):
    with pytest.raises(ValueError, match=r"not a GGUF file: it starts with b'ZIPF'"):
        load_gguf(write(tmp_path, b"ZIPF" + whole.read_bytes()[4:]))


def test_wrong_version(whole, tmp_path):
    data = whole.read_bytes()
    with pytest.raises(ValueError, match=r"GGUF version 9; versions 2 and 3"):
        load_gguf(write(tmp_path, data[:4] + b"\x09\0\0\0" + data[8:]))


@pytest.mark.parametrize("field", ["tensors", "entries"])
def test_absurd_counts_end_at_once(whole, tmp_path, field):
    data, at = whole.read_bytes(), {"tensors": 8, "entries": 16}[field]
    with pytest.raises(ValueError, match=r"corrupt"):
        load_gguf(write(tmp_path, data[:at] + b"\xff" * 8 + data[at + 8 :]))


def test_flipped_header_bytes_never_crash(whole, tmp_path):
    """Each either loads (a changed letter in a name of no weight) or is a ValueError of ours."""
    data = whole.read_bytes()
    end = min(info.offset for info in read_header(whole).tensors.values())
    random = np.random.default_rng(0)
    refused = 0
    for at in random.choice(end, 120, replace=False):
        flipped = bytearray(data)
        flipped[at] ^= int(random.integers(1, 256))
        path = write(tmp_path, bytes(flipped))
        try:
            load_gguf(path)
        except ValueError as error:
            assert "broken.gguf" in str(error), error
            refused += 1
    assert refused > 60


def test_absurd_number_of_layers_ends_at_once(tmp_path):
    config, weights = small_checkpoints.small("llama2")
    bent = config | {"num_hidden_layers": 1 << 30}
    path = small_checkpoints.write_gguf(tmp_path / "m.gguf", bent, weights)
    with pytest.raises(ValueError, match=r"claims 1073741824 layers but holds 21 tensors"):
        load_gguf(path)


def test_flipped_scale_is_found(tmp_path):
    config, weights = small_checkpoints.small("llama2")
    weights["model.norm.weight"] = np.full(64, np.nan, np.float32)
    path = small_checkpoints.write_gguf(tmp_path / "m.gguf", config, weights)
    with pytest.raises(ValueError, match=r"corrupt: the tensor 'output_norm.weight' holds NaN"):
        load_gguf(path)


def test_other_architecture(tmp_path):
    config, weights = small_checkpoints.small("llama2")
    path = tmp_path / "m.gguf"
    small_checkpoints.write_gguf(path, config, weights, architecture="mamba")
    with pytest.raises(ValueError, match=r"architecture 'mamba'; supported: 'llama', .*'qwen3'"):
        load_gguf(path)


def test_missing_tensor(tmp_path):
    config, weights = small_checkpoints.small("llama2")
    del weights["model.layers.1.mlp.up_proj.weight"]
    path = small_checkpoints.write_gguf(tmp_path / "m.gguf", config, weights)
    with pytest.raises(ValueError, match=r"lacks 1 tensor\(s\): blk\.1\.ffn_up\.weight"):
        load_gguf(path)


def test_unexpected_tensor(tmp_path):
    config, weights = small_checkpoints.small("llama2")
    weights["model.layers.0.extra.weight"] = np.ones(4, np.float32)
    path = small_checkpoints.write_gguf(tmp_path / "m.gguf", config, weights)
    with pytest.raises(ValueError, match=r"holds 1 tensor\(s\): blk\.0\.extra\.weight"):
        load_gguf(path)


def test_unknown_rope_rule(tmp_path):
    config, weights = small_checkpoints.small("llama3_1")
    bent = config | {"rope_scaling": config["rope_scaling"] | {"high_freq_factor": 3.0}}
    path = small_checkpoints.write_gguf(tmp_path / "m.gguf", bent, weights)
    with pytest.raises(ValueError, match=r"does not follow Llama 3\.1's rule"):
        load_gguf(path)


def test_unsupported_tokenizer(tmp_path):
    path = tmp_path / "m.gguf"
    small_checkpoints.write_gguf(path, *small_checkpoints.small("llama2"), pre="default")
    with pytest.raises(ValueError, match=r"pre-tokenizer 'default' is not supported"):
        load_gguf(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.gguf: no such file"):
        load_gguf(tmp_path / "nothing.gguf")
