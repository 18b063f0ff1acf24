"""Small random Llamas of every variant, equal to the bit on both sides of a parity test.

A weight of n values takes the next n words of Philox(seed), in the order of
`weight_shapes`, turned to floats by their top 24 bits: numpy promises the words, not its normals.
"""

import math

import numpy as np

_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_COMMON = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": 80,
    "num_hidden_layers": 2,
    "intermediate_size": 112,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
}


def _variant(
    hidden: int, heads: int, kv_heads: int, tied: bool, theta: float, rope: dict | None, **more
):
    return _COMMON | {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
        "rope_theta": theta,
        "rope_scaling": rope,
        **more,
    }


# The values of config.json. The scaled ones see 24 tokens on from an original context of 16.
VARIANTS = {
    "llama2": _variant(64, 4, 4, False, 10_000.0, None),
    "llama3_1": _variant(64, 4, 2, False, 500_000.0, _ROPE),
    "llama3_2": _variant(64, 4, 1, True, 500_000.0, _ROPE | {"factor": 32.0}),
    "smollm2": _variant(72, 9, 3, True, 100_000.0, None),
    "mistral": _variant(
        64,
        4,
        2,
        False,
        1e6,
        None,
        model_type="mistral",
        architectures=["MistralForCausalLM"],
        sliding_window=None,
    ),
    "qwen2": _variant(
        64, 4, 2, True, 1e6, None, model_type="qwen2", architectures=["Qwen2ForCausalLM"]
    ),
    # Whose heads are not hidden_size // num_attention_heads wide.
    "qwen3": _variant(
        64,
        4,
        2,
        False,
        1e6,
        None,
        model_type="qwen3",
        architectures=["Qwen3ForCausalLM"],
        head_dim=32,
    ),
}

TOKENS = np.array([[(7 * i + 3) % 80 for i in range(24)], [(i * i + 11) % 80 for i in range(24)]])

PROMPT, GREEDY = TOKENS[:, :14], 50  # as long as the context, together


def weight_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Hugging Face's names and (out, in) shapes, in the order the weights are drawn."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    h = config.get("head_dim", d // config["num_attention_heads"])
    q, kv = h * config["num_attention_heads"], h * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (v, d)}
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm": (d,),
            "self_attn.q_proj": (q, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, q),
            "post_attention_layernorm": (d,),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
        }
        if config["model_type"] == "qwen3":
            layer |= {"self_attn.q_norm": (h,), "self_attn.k_norm": (h,)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        if config["model_type"] == "qwen2":
            biases = {"q": (q,), "k": (kv,), "v": (kv,)}
            shapes |= {
                f"model.layers.{i}.self_attn.{name}_proj.bias": shape
                for name, shape in biases.items()
            }
    shapes["model.norm.weight"] = (d,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    return shapes


def draw_weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Uniform matrices of variance 1 / fan-in, norms around one, biases around zero; float32."""
    words = np.random.Philox(seed)
    weights = {}
    for name, shape in weight_shapes(config).items():
        raw = words.random_raw(math.prod(shape)).reshape(shape)
        unit = (raw >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)
        is_vector = len(shape) == 1
        scale = np.float32(0.3 if is_vector else math.sqrt(3 / shape[-1]))
        weights[name] = unit * scale + np.float32(is_vector and not name.endswith(".bias"))
    return weights
