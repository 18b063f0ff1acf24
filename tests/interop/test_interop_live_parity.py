"""Parity with the transformers installed here, without golden files in between."""

import dataclasses
import importlib
import types
from pathlib import Path

import config_cases
import jax.numpy as jnp
import numpy as np
import pytest
import small_checkpoints
import small_llamas
import small_sentencepiece as small
import tokenizers

from lora_jax.data import byte_tokenizer
from lora_jax.interop import load_gguf, load_huggingface, save_gguf, save_huggingface
from lora_jax.interop.gguf_tokenizer import tokenizer_from_gguf, tokenizer_to_gguf
from lora_jax.interop.tokenizers import tokenizer_from_huggingface
from lora_jax.models import llama
from lora_jax.models.generate import generate

torch = pytest.importorskip("torch", reason="requirements-parity.txt is not installed")
transformers = pytest.importorskip("transformers", reason="requirements-parity.txt")

UNSCALED = [name for name, v in small_llamas.VARIANTS.items() if v["rope_scaling"] is None]


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("name", small_llamas.VARIANTS)
def test_folders_saved_by_transformers(tmp_path, name):
    """Its own config.json, shards and index; then fifty greedy tokens."""
    config = transformers.AutoConfig.for_model(**small_llamas.VARIANTS[name], eos_token_id=78)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    small_checkpoints.small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    ours = load_huggingface(tmp_path)
    tokens = small_llamas.TOKENS
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
        prompt, count = small_llamas.PROMPT[:1], small_llamas.GREEDY
        options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None}
        continued = model.generate(torch.from_numpy(prompt), **options).numpy()
    logits = llama.forward(ours.params, jnp.asarray(tokens), ours.config)
    assert relative_error(np.asarray(logits), theirs) <= 1e-4
    lengths = jnp.array([prompt.shape[1]])
    generated = generate(
        ours.params, jnp.asarray(prompt), lengths, ours.config, max_new_tokens=count, eos_id=-1
    )
    np.testing.assert_array_equal(generated, continued[:, prompt.shape[1] :])


def both_logits(folder: Path, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    ours = load_huggingface(folder)
    return np.asarray(llama.forward(ours.params, jnp.asarray(tokens), ours.config)), theirs


@pytest.mark.parametrize(
    ("name", "changes"), config_cases.HARMLESS + [case[:2] for case in config_cases.WINDOWED]
)
def test_keys_of_a_config(tmp_path, name, changes):
    """What loads is computed as transformers does."""
    config, weights = small_checkpoints.small(name)
    folder = small_checkpoints.write_huggingface(tmp_path / "m", config | changes, weights)
    ours, theirs = both_logits(folder, small_llamas.TOKENS)
    assert relative_error(ours, theirs) <= 1e-4


@pytest.mark.parametrize("bare", [False, True])
def test_a_tie_that_the_tensors_deny(tmp_path, bare):
    config, weights = small_checkpoints.small("llama2")
    if bare:
        weights = {key.removeprefix("model."): x for key, x in weights.items()}
    tied = config | {"tie_word_embeddings": True}
    folder = small_checkpoints.write_huggingface(tmp_path / "m", tied, weights)
    assert relative_error(*both_logits(folder, small_llamas.TOKENS)) <= 1e-4


def test_four_bits_saved_by_bitsandbytes(tmp_path):
    """Whose CPU build computes in float32 what our weights decode to."""
    pytest.importorskip("bitsandbytes", reason="requirements-parity.txt")
    values = small_llamas.VARIANTS["llama3_1"] | {"intermediate_size": 128}
    weights = small_llamas.draw_weights(values)
    plain = small_checkpoints.write_huggingface(tmp_path / "plain", values, weights)
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=how, device_map="cpu", dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "packed")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "packed" / name).write_bytes((plain / name).read_bytes())
    with torch.no_grad():
        theirs = model(torch.from_numpy(small_llamas.TOKENS)).logits.numpy()
    ours = load_huggingface(tmp_path / "packed")
    logits = llama.forward(ours.params, jnp.asarray(small_llamas.TOKENS), ours.config)
    assert relative_error(np.asarray(logits), theirs) <= 1e-4


@pytest.mark.parametrize("name", small_llamas.VARIANTS)
def test_folders_for_transformers(tmp_path, name):
    """From a GGUF, so that all is written anew; with the tokenizer and its chat template."""
    source = small_checkpoints.write_gguf(tmp_path / "m.gguf", *small_checkpoints.small(name))
    ours = load_gguf(source)
    tokenizer = dataclasses.replace(ours.tokenizer, chat_template="{{ messages[0]['content'] }}")
    ours = dataclasses.replace(ours, tokenizer=tokenizer)
    save_huggingface(tmp_path / "out", ours, shard_bytes=100_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(small_llamas.TOKENS)).logits.numpy()
    logits = llama.forward(ours.params, jnp.asarray(small_llamas.TOKENS), ours.config)
    assert relative_error(np.asarray(logits), theirs) <= 1e-5
    weights = model.lm_head.weight, model.model.embed_tokens.weight
    assert (weights[0].data_ptr() == weights[1].data_ptr()) == ours.config.tie_embeddings
    assert model.generation_config.eos_token_id == 78
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = reader.apply_chat_template([{"role": "user", "content": "ab0"}], tokenize=False)
    assert (text, reader(text).input_ids) == ("ab0", tokenizer.encode("ab0"))
    assert (reader.eos_token_id, reader.pad_token_id) == (78, 79)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
@pytest.mark.parametrize("name", UNSCALED)
def test_gguf_files_for_another_reader(tmp_path, name, kind):
    """transformers knows no Llama 3.1 scaling in a GGUF, and takes all of Qwen3's heads for 128."""
    values = small_llamas.VARIANTS[name] | ({"head_dim": 128} if name == "qwen3" else {})
    weights = small_llamas.draw_weights(values)
    folder = small_checkpoints.write_huggingface(tmp_path / "s", values, weights)
    save_gguf(tmp_path / "m.gguf", load_huggingface(folder), kind=kind)
    ours = load_gguf(tmp_path / "m.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(small_llamas.TOKENS)).logits.numpy()
    logits = llama.forward(ours.params, jnp.asarray(small_llamas.TOKENS), ours.config)
    assert relative_error(np.asarray(logits), theirs) <= 1e-5


def test_tokenizer_saved_by_transformers(tmp_path):
    core = byte_tokenizer().core
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    theirs.chat_template = "{{ messages }}"
    theirs.save_pretrained(tmp_path)
    ours = tokenizer_from_huggingface(tmp_path)
    assert (ours.eos_id, ours.pad_id) == (theirs.eos_token_id, theirs.pad_token_id)
    assert ours.bos_id is None and ours.chat_template == "{{ messages }}"
    text = "Grüße <|im_start|> 42"
    assert ours.encode(text) == theirs(text).input_ids


def sentencepiece_merges() -> list[tuple[str, str]]:
    """As transformers makes them of pieces and scores."""
    tokens, scores = small.TOKENS, dict(zip(small.TOKENS, small.SCORES, strict=True))
    others = [token for token, kind in zip(tokens, small.KINDS, strict=True) if kind != 1]
    vocab = {token: i for i, token in enumerate(tokens)}
    return transformers.tokenization_utils_base.generate_merges(vocab, scores, others)


def add_sentencepiece_tokens(core: tokenizers.Tokenizer) -> None:
    for token, kind in zip(small.TOKENS, small.KINDS, strict=True):
        if kind in (2, 3, 4):
            added = tokenizers.AddedToken(token, special=kind != 4, normalized=False)
            core.add_tokens([added])


def test_sentencepiece_ids_are_those_of_the_converter_for_llama():
    """By its normalizer, with a model of the same pieces; the golden ids are these."""
    recipe = types.SimpleNamespace(original_tokenizer=types.SimpleNamespace(legacy=True))
    converter = importlib.import_module("transformers.convert_slow_tokenizer").LlamaConverter
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {token: i for i, token in enumerate(small.TOKENS)},
            sentencepiece_merges(),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    core.normalizer = converter.normalizer(recipe, None)
    core.decoder = converter.decoder(recipe, "▁", True)
    add_sentencepiece_tokens(core)
    ours = tokenizer_from_gguf(Path("x.gguf"), small.entries())
    for text, golden in zip(small.TEXTS, small.GOLDEN, strict=True):
        assert core.encode(text, add_special_tokens=False).ids == ours.encode(text) == golden
        assert ours.decode(golden) == core.decode(golden, skip_special_tokens=False)


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_tokenizer_of_transformers(tmp_path, legacy):
    """Its own class, from a folder, into a GGUF and back."""
    vocab = {token: i for i, token in enumerate(small.TOKENS)}
    theirs = transformers.LlamaTokenizerFast(
        vocab=vocab, merges=sentencepiece_merges(), legacy=legacy, pad_token="<pad>"
    )
    add_sentencepiece_tokens(theirs.backend_tokenizer)
    theirs.save_pretrained(tmp_path)
    folder = tokenizer_from_huggingface(tmp_path)
    written = tokenizer_to_gguf(folder, len(vocab))
    file = tokenizer_from_gguf(Path("x.gguf"), written)
    del written["tokenizer.huggingface.json"]
    plain = tokenizer_from_gguf(Path("x.gguf"), written)
    for text in small.TEXTS:
        expected = theirs(text, add_special_tokens=False).input_ids
        assert folder.encode(text) == file.encode(text) == expected
        # llama.cpp's words for it: a space in front even of a space, and after special tokens.
        if not text.startswith((" ", "▁")) and not any(token in text for token in "<["):
            assert plain.encode(text) == expected


@pytest.mark.network
def test_smollm2(smollm2):
    path = smollm2.source.rpartition("/")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path[0], gguf_file=path[2], dtype=torch.float32
    )
    tokens = np.array([smollm2.tokenizer.encode("The keeper of the lighthouse had a cat.")])
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    logits = llama.forward(smollm2.params, jnp.asarray(tokens), smollm2.config)
    assert relative_error(np.asarray(logits), expected) <= 1e-4
