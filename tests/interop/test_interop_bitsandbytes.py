"""bitsandbytes' 4-bit checkpoints: ours and theirs, each way, to the bit."""

import dataclasses
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small_checkpoints
import small_llamas
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.interop import load, quantized, save_gguf, save_huggingface
from lora_jax.models import llama
from lora_jax.paths import flatten
from lora_jax.quant import FORMATS, Blockwise, DoubleQuantized
from lora_jax.weights import is_weight

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{Q_PROJ}.quant_state.bitsandbytes__nf4"
F8 = np.zeros(256, ml_dtypes.float8_e4m3fn)
WIDE = {"hidden_size": 128, "intermediate_size": 192}


def write(folder: Path, name: str = "llama2") -> Path:
    """A small model whose rows fill blocks of 64."""
    config = small_llamas.VARIANTS[name] | WIDE
    return small_checkpoints.write_huggingface(folder, config, small_llamas.draw_weights(config))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("bitsandbytes") / "plain")


@pytest.fixture(scope="module")
def model(plain):
    return load(plain, place=quantized("nf4"))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bitsandbytes") / "nf4"
    save_huggingface(path, model)
    return path


def changed(folder: Path, to: Path, *, without: str = "", config=None, **tensors) -> Path:
    """A copy of `folder` with other tensors, or another quantization_config."""
    to.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (to / name).write_bytes((folder / name).read_bytes())
    stated = json.loads((folder / "config.json").read_text())
    stated["quantization_config"] |= config or {}
    (to / "config.json").write_text(json.dumps(stated))
    held = load_file(folder / "model.safetensors") | tensors
    save_file({k: v for k, v in held.items() if k != without}, to / "model.safetensors")
    return to


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_round_trip(plain, tmp_path, format, double_quant):
    how = {"block_size": 32, "double_quant": double_quant}
    saved = load(plain, dtype=jnp.bfloat16, place=quantized(format, **how))
    save_huggingface(tmp_path / "out", saved, shard_bytes=60_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stated["quant_method"] == "bitsandbytes" and stated["load_in_4bit"]
    found = stated["bnb_4bit_quant_type"], stated["bnb_4bit_use_double_quant"]
    assert found == (format, double_quant) and stated["llm_int8_skip_modules"] == ["lm_head"]
    again = load(tmp_path / "out", dtype=jnp.bfloat16)
    chex.assert_trees_all_equal(again.params, saved.params)
    save_huggingface(tmp_path / "twice", again)
    assert (tmp_path / "twice" / "config.json").read_text() == (
        tmp_path / "out" / "config.json"
    ).read_text()


def test_some_linears_and_biases(tmp_path):
    """Attention alone, with biases beside it and a head that is the embedding."""
    place = quantized("nf4", targets="attention")
    saved = load(write(tmp_path / "plain", "qwen2"), place=place)
    save_huggingface(tmp_path / "out", saved)
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stated["llm_int8_skip_modules"] == ["gate_proj", "up_proj", "down_proj", "lm_head"]
    chex.assert_trees_all_equal(load(tmp_path / "out").params, saved.params)


def test_a_head_in_4_bits(plain, tmp_path):
    saved = load(plain, place=quantized("nf4", targets=["all-linear", "lm_head"]))
    save_huggingface(tmp_path / "out", saved)
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stated["llm_int8_skip_modules"] == []
    chex.assert_trees_all_equal(load(tmp_path / "out").params, saved.params)


def test_place_sees_the_float_leaves(folder, model):
    seen = []
    load(folder, place=lambda path, leaf: seen.append(path))
    weights = flatten(model.params, is_leaf=is_weight)
    assert set(seen) == {p for p, leaf in weights.items() if not isinstance(leaf, Blockwise)}
    assert "embed" in seen and len(seen) == len(weights) - 7


def test_progress_counts_every_leaf(folder, model, monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    load(folder)
    leaves = jax.tree.leaves(model.params, is_leaf=is_weight)
    total = sum(np.prod(leaf.shape) for leaf in leaves) * 4 / 1e6
    assert f"{total:.1f}/{total:.1f} MB" in capfd.readouterr().err


def state(**changes) -> np.ndarray:
    known = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [128, 128]}
    nested = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
    return np.frombuffer(json.dumps(known | nested | changes).encode(), np.uint8)


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        (STATE, state(shape=[128, 64]), r"q_proj\.weight' has shape \(128, 64\)"),
        (STATE, state(shape=[128, "x"]), r"nf4 is corrupt: expected JSON of a shape"),
        (STATE, state(blocksize=0), r"nf4 is corrupt"),
        (STATE, state(blocksize=31), r"nf4 is corrupt"),
        (STATE, state(dtype="object"), r"nf4 is corrupt"),
        (STATE, state(nested_offset=float("nan")), r"nf4 is corrupt"),
        (STATE, state(nested_offset=1e300), r"nf4 is corrupt"),
        (STATE, state(blocksize=256), r"blocks of 256 run across its rows of 128"),
        (STATE, state(blocksize=32), r"absmax holds 256 entries .* expected 512"),
        (STATE, state(nested_blocksize=64), r"nested blocks of 64, expected 256"),
        (STATE, np.frombuffer(b"[" * 10**5, np.uint8), r"nf4 is not .*: it is no short text"),
        (STATE, np.frombuffer(b"[" * 10**3, np.uint8), r"nf4 is corrupt"),
        (STATE, np.zeros(3, np.float64), r"it is no short text"),
        (Q_PROJ, np.zeros((9, 1), np.uint8), r"weight holds 9 entries of uint8, expected 8192"),
        (STATE.replace("nf4", "fp4"), state(), r"q_proj\.weight has two quant_states"),
        (f"{Q_PROJ}.absmax", F8, r"absmax is F8_E4M3; bitsandbytes writes U8 and F32"),
        (f"{Q_PROJ}.quant_map", np.ones(16, np.float32), r"is not the codebook of this format"),
        ("model.norm.weight", np.zeros(128, np.uint8), r"'model\.norm\.weight' is U8, expected"),
    ],
)
def test_corrupt_tensors(folder, tmp_path, tensor, value, message):
    with pytest.raises(ValueError, match=message):
        load(changed(folder, tmp_path / "bad", **{tensor: value}))


@pytest.mark.parametrize(
    ("without", "message"),
    [
        (STATE, r"holds \d tensor\(s\): model\.layers\.0\.self_attn\.q_proj\.weight\.absmax"),
        (Q_PROJ, r"lacks model\.layers\.0\.self_attn\.q_proj\.weight, which"),
        (f"{Q_PROJ}.absmax", r"lacks .*\.absmax, which"),
    ],
)
def test_missing_tensors(folder, tmp_path, without, message):
    with pytest.raises(ValueError, match=message):
        load(changed(folder, tmp_path / "bad", without=without))


def test_a_leaf_of_which_some_layers_are_quantised(folder, tmp_path):
    bad = changed(folder, tmp_path / "bad")
    held = {k: v for k, v in load_file(bad / "model.safetensors").items() if Q_PROJ not in k}
    held[Q_PROJ] = np.zeros((128, 128), np.float32)
    save_file(held, bad / "model.safetensors")
    with pytest.raises(ValueError, match="of layers/attn/q_proj, 1 of 2 tensors are in 4 bits"):
        load(bad)


@pytest.mark.parametrize(
    "config", [{"load_in_4bit": False, "load_in_8bit": True}, {"quant_method": "gptq"}]
)
def test_other_quantisations_are_refused(folder, tmp_path, config):
    with pytest.raises(ValueError, match=r"supported: \{'quant_method': 'bitsandbytes', 'load_in"):
        load(changed(folder, tmp_path / "bad", config=config))


def test_what_cannot_be_written(plain, model, tmp_path):
    def save(message, place):
        with pytest.raises(ValueError, match=message):
            save_huggingface(tmp_path / "out", load(plain, place=place))

    for format in FORMATS.keys() - {"nf4", "fp4"}:
        save(rf"layers/attn/k_proj is .* has no {format}, only nf4 and fp4", quantized(format))
    save(r"k_proj is NF4.*blocks of 16.*has blocks of 32", quantized("nf4", block_size=16))
    save(r"embed is NF4.* quantises no embedding", quantized("nf4", targets="embed", block_size=16))
    one, other = quantized("nf4", targets="attention"), quantized("fp4", targets="mlp")
    save(r"2 formats of 4-bit weights", lambda p, leaf: (one if "attn" in p else other)(p, leaf))
    with pytest.raises(ValueError, match=r"dequantise first.* dequantize\(params\)"):
        save_gguf(tmp_path / "m.gguf", model)
    assert not list(tmp_path.iterdir())
    whole = dataclasses.replace(model, params=lora.dequantize(model.params))
    save_gguf(tmp_path / "m.gguf", whole)


@pytest.fixture(scope="module")
def parity():
    torch = pytest.importorskip("torch", reason="requirements-parity.txt is not installed")
    transformers = pytest.importorskip("transformers", reason="requirements-parity.txt")
    bnb = pytest.importorskip("bitsandbytes.functional", reason="requirements-parity.txt")
    return torch, transformers, bnb


def their_logits(parity, folder: Path) -> tuple:
    torch, transformers, _ = parity
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map="cpu", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        return theirs, theirs(torch.from_numpy(small_llamas.TOKENS)).logits.numpy()


def assert_close_logits(model, theirs):
    logits = llama.forward(model.params, jnp.asarray(small_llamas.TOKENS), model.config)
    assert np.abs(logits - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("format", "double_quant", "targets"),
    [
        ("nf4", True, "all-linear"),
        ("fp4", False, "attention"),
        ("nf4", False, ["all-linear", "lm_head"]),
    ],
)
def test_folders_for_transformers(parity, plain, tmp_path, format, double_quant, targets):
    how = {"double_quant": double_quant, "targets": targets}
    model = load(plain, place=quantized(format, **how))
    save_huggingface(tmp_path / "out", model)
    theirs, logits = their_logits(parity, tmp_path / "out")
    linears = {name: type(module).__name__ for name, module in theirs.named_modules()}
    weights = flatten(model.params, is_leaf=is_weight)
    for name, path in {
        "model.layers.1.self_attn.q_proj": "layers/attn/q_proj",
        "model.layers.1.mlp.up_proj": "layers/mlp/up_proj",
        "lm_head": "lm_head",
    }.items():
        expected = "Linear4bit" if isinstance(weights[path], Blockwise) else "Linear"
        assert linears[name] == expected, name
    assert_close_logits(model, logits)


@pytest.mark.parametrize(("double_quant", "dtype"), [(False, "bfloat16"), (True, "float32")])
def test_folders_saved_by_transformers(parity, plain, tmp_path, double_quant, dtype):
    torch, transformers, bnb = parity
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=how, device_map="cpu", dtype=getattr(torch, dtype)
    )
    theirs.save_pretrained(tmp_path)
    small_checkpoints.small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    small_checkpoints.write_json(
        tmp_path / "tokenizer_config.json", small_checkpoints.TOKENIZER_CONFIG
    )
    ours = load(tmp_path, dtype=dtype)
    weights = flatten(ours.params["layers"], is_leaf=is_weight)
    quantised = {path: w for path, w in weights.items() if isinstance(w, Blockwise)}
    assert len(quantised) == 7
    for path, weight in quantised.items():
        assert isinstance(weight.absmax, DoubleQuantized) == double_quant
        assert weight.dtype == jnp.dtype(dtype)
        dense = np.asarray(lora.dequantize(weight).astype(jnp.float32))
        for values, layer in zip(dense, theirs.model.layers, strict=True):
            name = path.replace("attn/", "self_attn/").replace("/", ".")
            stored = layer.get_submodule(name).weight
            expected = bnb.dequantize_4bit(stored.data, stored.quant_state).float().numpy()
            np.testing.assert_array_equal(values, expected.T, err_msg=path)
    if dtype == "float32":
        assert_close_logits(ours, their_logits(parity, tmp_path)[1])
