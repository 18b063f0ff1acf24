"""Writes the small random Llamas as a Hugging Face folder and as a GGUF file."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import small_llamas
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CHARACTERS = [chr(c) for c in range(ord("0"), ord("0") + 76)]
TOKENS = [*CHARACTERS, "ab", "<s>", "</s>", "<pad>"]
TOKENIZER_CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
Q8_0 = gguf.GGMLQuantizationType.Q8_0
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_huggingface(
    folder: Path, config: Mapping, weights: Mapping[str, np.ndarray], *, shards: int = 1
) -> Path:
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config)
    if shards == 1:
        save_file(dict(weights), folder / "model.safetensors")
    else:
        weight_map = {}
        for i in range(shards):
            name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            held = {key: weights[key] for key in list(weights)[i::shards]}
            save_file(held, folder / name)
            weight_map |= dict.fromkeys(held, name)
        write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    small_tokenizer().save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    return folder


def small_tokenizer() -> Tokenizer:
    """The one that `write_gguf` writes, as GPT-2's kind."""
    vocab = {token: i for i, token in enumerate(TOKENS)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(TOKENS[77:])
    return core


def write_json(path: Path, value: Mapping) -> None:
    path.write_text(json.dumps(value))


def write_gguf(
    path: Path,
    config: Mapping,
    weights: Mapping[str, np.ndarray],
    *,
    architecture: str | None = None,
    pre: str = "gpt-2",
    q8: tuple[str, ...] = (),
    tokenizer: Mapping | None = None,
    more: Mapping | None = None,
) -> Path:
    """`tokenizer` takes the small one's place; `more` metadata is added as it is."""
    is_llama = config["model_type"] in ("llama", "mistral")
    writer = gguf.GGUFWriter(path, architecture or ("llama" if is_llama else config["model_type"]))
    rope = config["rope_scaling"]
    _add_metadata(writer, config)
    if tokenizer is None:
        _add_tokenizer(writer, pre)
    for key, value in {**(tokenizer or {}), **(more or {})}.items():
        _add_entry(writer, key, value)
    if rope:
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        divisors = rope_divisors(rope, config["rope_theta"], head_dim)
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
    for name, weight in weights.items():
        if is_llama and "q_proj" in name:
            weight = _interleave(weight, config["num_attention_heads"])
        if is_llama and "k_proj" in name:
            weight = _interleave(weight, config["num_key_value_heads"])
        if name in q8:
            weight = gguf.quants.quantize(weight, Q8_0)
        writer.add_tensor(gguf_name(name), weight, raw_dtype=Q8_0 if name in q8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{GGUF_NAMES.get(stem, stem)}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES.get(rest, rest)}.{kind}"


def rope_divisors(rope: Mapping, theta: float, head_dim: int) -> list[float]:
    """What convert_hf_to_gguf writes: one divisor a frequency."""
    context, divisors = rope["original_max_position_embeddings"], []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < context / rope["high_freq_factor"]:
            divisors.append(1.0)
        elif wavelength > context / rope["low_freq_factor"]:
            divisors.append(rope["factor"])
        else:
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            kept = (context / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - kept) / rope["factor"] + kept))
    return divisors


def _add_metadata(writer: gguf.GGUFWriter, config: Mapping) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])


def _add_tokenizer(writer: gguf.GGUFWriter, pre: str) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * 77 + [3] * 3)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(77)
    writer.add_eos_token_id(78)
    writer.add_pad_token_id(79)


def _add_entry(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def small(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    config = small_llamas.VARIANTS[name]
    return config, small_llamas.draw_weights(config)
