"""Small random models of every dense family, as config.json values and weights.

`python tests/interop/dense_families.py [NAME ...]` records tests/golden/dense_families.json from
transformers (requirements-parity.txt).
"""

import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import small_checkpoints

from lora_jax.interop.huggingface_config import config_from_huggingface
from lora_jax.interop.model_tensors import names_of

GOLDEN = Path(__file__).parents[1] / "golden" / "dense_families.json"
TOKENS = np.random.default_rng(0).integers(0, 75, (2, 24))
PROMPT, GREEDY = TOKENS[:1, :20], 50
_COMMON = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000.0,
    "tie_word_embeddings": False,
}


def _of(model_type: str, **changes) -> dict:
    return _COMMON | {"model_type": model_type} | changes


def _scaled(**rope) -> dict:
    return _of("llama", rope_scaling=rope)


_GEMMA = _COMMON | {
    "head_dim": 8,
    "sliding_window": 5,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "cache_implementation": "hybrid",
}
_SHORT, _LONG = [1.0, 1.1, 1.3, 1.6], [1.0, 2.0, 4.0, 7.0]
# A llama with each scaling of RoPE, and each model type with what it reads beyond a Llama's.
CASES = {
    "gemma2": _GEMMA
    | {
        "model_type": "gemma2",
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
    },
    # Pieces of a RoPE as transformers 4 writes them, and as 5 does.
    "gemma3": _GEMMA
    | {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 8,
        "num_hidden_layers": 7,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "gemma3, other": {key: value for key, value in _GEMMA.items() if key != "rope_theta"}
    | {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 5,
        "final_logit_softcapping": 2.0,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "olmo2": _of("olmo2", num_key_value_heads=2, attention_bias=False),
    "olmo2 biases": _of("olmo2", attention_bias=True, tie_word_embeddings=True),
    "granite": _of(
        "granite",
        embedding_multiplier=3.0,
        attention_multiplier=0.5,
        residual_multiplier=0.75,
        logits_scaling=4.0,
    ),
    "granite biases": _of("granite", attention_bias=True, mlp_bias=True, logits_scaling=0.5),
    "smollm3": _of("smollm3", num_hidden_layers=5, no_rope_layers=[1, 1, 1, 0, 1], pad_token_id=0),
    "smollm3, other": {key: value for key, value in _COMMON.items() if key != "rope_theta"}
    | {
        "model_type": "smollm3",
        "pad_token_id": 0,
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "phi3": _of("phi3", sliding_window=None, resid_pdrop=0.0, pad_token_id=0),
    "phi3 window": _of("phi3", sliding_window=7, pad_token_id=0),
    "phi3 longrope": _of(
        "phi3",
        partial_rotary_factor=0.5,
        pad_token_id=0,
        original_max_position_embeddings=16,
        rope_scaling={"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 7.0]},
    ),
    # As wide as a reader of GGUF takes all of them for.
    "gemma2 heads": _GEMMA | {"model_type": "gemma2", "head_dim": 256},
    "gemma3 heads": _GEMMA | {"model_type": "gemma3_text", "head_dim": 256},
    "biases": _of("llama", attention_bias=True, mlp_bias=True),
    "qwen3 biases": _of("qwen3", attention_bias=True, head_dim=16),
    "mistral window": _of("mistral", sliding_window=7),
    "ministral": _of(
        "ministral",
        sliding_window=5,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "qwen2 windows": _of("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=2),
    "qwen3 windows": _of(
        "qwen3",
        use_sliding_window=True,
        sliding_window=5,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "linear": _scaled(rope_type="linear", factor=4.0),
    "dynamic": _scaled(rope_type="dynamic", factor=4.0) | {"max_position_embeddings": 16},
    "yarn": _scaled(rope_type="yarn", factor=4.0, original_max_position_embeddings=24),
    "yarn in full": _scaled(
        rope_type="yarn",
        factor=6.0,
        original_max_position_embeddings=16,
        beta_fast=4.0,
        beta_slow=0.5,
        mscale=1.5,
        mscale_all_dim=0.5,
        truncate=False,
    ),
    "longrope": _scaled(
        rope_type="longrope",
        short_factor=_SHORT,
        long_factor=_LONG,
        original_max_position_embeddings=16,
    ),
    "longrope, short": _scaled(
        rope_type="longrope",
        short_factor=_SHORT,
        long_factor=_LONG,
        original_max_position_embeddings=80,
        factor=3.0,
    ),
}
FAMILIES = (
    "gemma2",
    "gemma3",
    "olmo2",
    "granite",
    "smollm3",
    "phi3",
)  # those that are tested in full
# Whose cached keys transformers leaves with the frequencies of shorter rows.
NOT_GENERATED = ("dynamic",)
# Why they have no GGUF.
_NO_PLACE = "GGUF has no place for"
NO_GGUF = {
    "qwen3 biases": "llama.cpp reads no biases of attention",
    "gemma3, other": "llama.cpp computes a gemma3 with",
    "olmo2 biases": "llama.cpp reads no biases of attention in an olmo2",
    "smollm3, other": "llama.cpp computes a smollm3 without biases",
    "ministral": "llama.cpp has no layers with a window beside",
    "qwen2 windows": "llama.cpp has no layers with a window beside",
    "qwen3 windows": "llama.cpp has no layers with a window beside",
    "dynamic": _NO_PLACE,
    "yarn in full": _NO_PLACE,
    "longrope": _NO_PLACE,
    "longrope, short": _NO_PLACE,
}


def weights_of(values: dict, seed: int = 1) -> dict[str, np.ndarray]:
    """Random weights under transformers' names: matrices of variance 1 / fan-in, and vectors
    around the initial ones."""
    with tempfile.TemporaryDirectory() as folder:
        small_checkpoints.write_json(Path(folder) / "config.json", values)
        config = config_from_huggingface(Path(folder))
    rng, weights = np.random.default_rng(seed), {}
    for leaf in config.family.parameters(config):
        for name in names_of(leaf, "huggingface", config.num_layers):
            drawn = rng.normal(size=leaf.shape).astype("f4")
            is_vector = len(leaf.shape) == 1
            scale = 0.3 if is_vector else 1.5 / math.sqrt(leaf.shape[1])
            weights[name] = drawn * np.float32(scale) + np.float32(is_vector and leaf.initial)
    return weights


def write(folder: Path, name: str, **changes) -> Path:
    """The case as a Hugging Face folder, with these keys of its config.json changed after."""
    values = CASES[name]
    return small_checkpoints.write_huggingface(folder, values | changes, weights_of(values))


def golden(name: str) -> dict:
    return json.loads(GOLDEN.read_text())[name]


def their_model(folder: Path):
    """transformers' model of a folder, which has all of its weights and no other."""
    import torch
    import transformers

    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    left = {key: value for key, value in loading.items() if value}
    assert not left, left
    return model.eval()


def their_logits(model, tokens: np.ndarray, **more) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens), **more).logits.numpy()


def their_tokens(model) -> list[int]:
    import torch

    prompt = torch.from_numpy(PROMPT)
    options = {"max_new_tokens": GREEDY, "do_sample": False, "eos_token_id": None}
    return model.generate(prompt, **options)[0, PROMPT.shape[1] :].tolist()


def _record(names: list[str]) -> None:
    found = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            model = their_model(write(Path(folder), name))
        logits = their_logits(model, TOKENS)[:, -1, :6]
        tokens = [] if name in NOT_GENERATED else their_tokens(model)
        found[name] = {"logits": np.round(logits.astype(float), 6).tolist(), "tokens": tokens}
    lines = [f"{json.dumps(name)}: {json.dumps(found[name])}" for name in CASES if name in found]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    _record(sys.argv[1:])
