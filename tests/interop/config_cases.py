"""Changes of a small config.json that transformers reads: each loads as it computes, or is refused.

A case is (variant, changes): the default run holds what we do; a live test, transformers beside it.
"""

ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SWITCHED = {"sliding_window": 12, "use_sliding_window": True}
FULL, SLIDING = ["full_attention"] * 2, ["sliding_attention"] * 2

# transformers computes what it computes without the change, and so do we.
HARMLESS = [
    ("llama2", {"pretraining_tp": 2}),
    ("llama2", {"hidden_act": "swish"}),
    ("llama2", {"is_causal": True}),
    ("llama2", {"attention_dropout": 0.0, "initializer_range": 0.1, "use_cache": False}),
    ("llama2", {"dtype": "bfloat16", "torch_dtype": "float16"}),
    ("llama2", {"original_max_position_embeddings": 8}),
    ("llama2", {"rope_scaling": {"rope_type": "default"}, "rope_theta": 10_000}),
    ("llama2", {"rope_scaling": {"type": "default", "rope_type": "default"}}),
    ("llama2", {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
    ("llama2", {"partial_rotary_factor": 1.0}),
    ("llama2", {"attn_logit_softcapping": None, "logit_scale": None}),
    ("llama2", {"layer_types": FULL}),
    ("llama2", {"temperature": 0.6, "top_p": 0.9, "_name_or_path": "x"}),
    ("llama2", {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 79}),
    ("llama3_1", {"rope_parameters": ROPE}),
    ("llama3_1", {"original_max_position_embeddings": 16}),
    ("mistral", {"attention_bias": True}),
    ("qwen2", {"attention_bias": True, "mlp_bias": True}),
    ("qwen2", {"sliding_window": 8, "use_sliding_window": False}),
    ("qwen2", {"sliding_window": 8, "use_sliding_window": True}),  # from layer 28 on
    ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}),
    ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "layer_types": FULL}),
    ("qwen2", {"use_mrope": False}),
    ("qwen3", {"sliding_window": None, "use_sliding_window": True}),
    ("qwen3", {"mlp_bias": True}),
]

# The windows of both layers. A Llama slides none in a row, but does as it generates, so that its
# context ends there.
WINDOWED = [
    ("mistral", {"sliding_window": 12}, (12, 12)),
    ("mistral", {"sliding_window": 100}, (100, 100)),
    ("mistral", {"sliding_window": 12, "use_sliding_window": False}, (12, 12)),
    ("mistral", {"sliding_window": 12, "layer_types": FULL, "head_dim": 16}, None),
    ("llama2", {"sliding_window": 12, "use_sliding_window": False}, None),
    (
        "qwen2",
        {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 1},
        (None, 12),
    ),
    ("qwen2", {"sliding_window": 12, "use_sliding_window": True, "layer_types": SLIDING}, (12, 12)),
    ("qwen3", {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 0}, (12, 12)),
]

# Refused, by the name that comes with it.
REFUSED = [
    ("llama2", {"is_causal": False}, "is_causal=False"),
    ("llama2", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("llama2", {"attention_bias": True}, r"lacks 8 tensor\(s\): .*self_attn.k_proj.bias"),
    ("llama2", {"mlp_bias": True}, r"lacks 6 tensor\(s\): .*mlp.down_proj.bias"),
    ("qwen3", {"attention_bias": True}, r"lacks 8 tensor\(s\): .*self_attn.k_proj.bias"),
    ("llama2", {"attention_bias": "yes"}, "attention_bias is 'yes', expected true"),
    ("llama2", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ("llama2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("llama2", {"per_layer_config": {"0": {"rms_norm_eps": 0.1}}}, "per_layer_config="),
    ("llama2", {"attn_logit_softcapping": 30.0}, "unknown attn_logit_softcapping=30.0"),
    ("llama2", {"final_logit_softcapping": 30.0}, "unknown final_logit_softcapping"),
    ("llama2", {"logit_scale": 0.5}, "unknown logit_scale=0.5"),
    ("llama2", {"logits_scaling": 8.0}, "unknown logits_scaling=8.0"),
    ("llama2", {"attention_multiplier": 0.1}, "unknown attention_multiplier=0.1"),
    ("llama2", {"residual_multiplier": 0.2}, "unknown residual_multiplier"),
    ("llama2", {"embedding_multiplier": 12}, "unknown embedding_multiplier"),
    ("llama2", {"query_pre_attn_scalar": 16}, "unknown query_pre_attn_scalar"),
    ("llama2", {"attention_chunk_size": 8}, "unknown attention_chunk_size"),
    ("llama2", {"num_local_experts": 4}, "unknown num_local_experts"),
    ("llama2", {"text_config": {"tie_word_embeddings": True}}, "unknown text_config="),
    ("llama2", {"use_bidirectional_attention": True}, "unknown use_bidirectional_attention"),
    ("llama2", {"no_rope_layers": [0, 1]}, "unknown no_rope_layers"),
    ("llama2", {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true"),
    ("llama2", {"tie_word_embeddings": None}, "tie_word_embeddings is None"),
    ("llama2", {"rms_norm_eps": None}, "rms_norm_eps is None"),
    ("llama2", {"rope_theta": True}, "rope_theta is True"),
    ("llama2", {"rope_scaling": {"factor": 4.0}}, "names no RoPE scaling by rope_type"),
    ("llama2", {"rope_scaling": {"type": "linear"}}, "'linear' lacks factor"),
    (
        "llama2",
        {"rope_scaling": {"type": "linear", "factor": 0}},
        "factor is 0, expected a positive",
    ),
    (
        "llama2",
        {"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 2}},
        "unknown beta_fast",
    ),
    ("llama2", {"rope_scaling": {"rope_type": "dynamic"}}, "'dynamic' lacks factor"),
    (
        "llama2",
        {"rope_scaling": {"type": "dynamic", "factor": 2, "original_max_position_embeddings": 32}},
        "original_max_position_embeddings is 32 beside a dynamic .*=64; keep one",
    ),
    ("llama2", {"rope_scaling": {"rope_type": "yarn"}}, "'yarn' lacks factor"),
    (
        "llama2",
        {"rope_scaling": {"type": "yarn", "factor": 2, "truncate": 1}},
        "truncate is 1",
    ),
    (
        "llama2",
        {"rope_scaling": {"type": "yarn", "factor": 2, "finetuned": True}},
        "unknown finet",
    ),
    ("llama2", {"rope_scaling": {"rope_type": "longrope"}}, "lacks short_factor, long_factor"),
    (
        "llama2",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        "short_factor of the RoPE scaling 'longrope' has 1 numbers, expected 8",
    ),
    (
        "llama2",
        {"rope_scaling": {"type": "longrope", "short_factor": 1.0, "long_factor": [1.0]}},
        "short_factor is 1.0, expected a list",
    ),
    (
        "llama2",
        {
            "original_max_position_embeddings": 8,
            "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
        },
        "original_max_position_embeddings is 8 beside a RoPE scaling that has 16",
    ),
    ("llama2", {"rope_scaling": {"rope_type": "proportional"}}, "'proportional' is not supported"),
    (
        "llama2",
        {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}},
        "both rope_type='default' and type='linear'",
    ),
    ("llama2", {"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "unknown factor in rope"),
    (
        "llama2",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5 in rope_parameters",
    ),
    (
        "llama2",
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "names no RoPE scaling",
    ),
    (
        "llama2",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}},
        "rope_theta contradicts itself: 10000.0 in config.json, 10.0 in rope_parameters",
    ),
    ("llama3_1", {"rope_scaling": ROPE | {"rope_theta": 10.0}}, "rope_theta contradicts itself"),
    (
        "llama3_1",
        {"rope_theta": None, "rope_parameters": ROPE | {"rope_theta": 500_000.0}},
        "rope_theta stands in rope_parameters alone",
    ),
    (
        "llama3_1",
        {"rope_parameters": {"rope_type": "default"}},
        "rope_scaling=.* contradicts rope_parameters=",
    ),
    ("llama3_1", {"rope_parameters": ROPE | {"factor": 4.0}}, "contradicts rope_parameters"),
    (
        "llama3_1",
        {"original_max_position_embeddings": 8},
        "original_max_position_embeddings is 8 beside a RoPE scaling that has 16",
    ),
    ("llama3_1", {"rope_scaling": ROPE | {"high_freq_factor": 1.0}}, "high_freq_factor=1.0, exp"),
    ("llama3_1", {"rope_scaling": ROPE | {"attention_factor": 1.5}}, "unknown attention_factor"),
    (
        "llama3_1",
        {"rope_scaling": ROPE | {"original_max_position_embeddings": 16.5}},
        "original_max_position_embeddings is 16.5, expected a count",
    ),
    ("llama2", {"layer_types": SLIDING}, "'sliding_attention' without a sliding_window"),
    ("llama2", {"layer_types": FULL[:1]}, "layer_types lists 1 layers, and num_hidden_layers is 2"),
    ("llama2", {"layer_types": ["linear_attention"] * 2}, r"layer_types is \['linear_attention'"),
    ("qwen2", {"sliding_window": 8, "layer_types": SLIDING}, "without a sliding_window in use"),
    ("qwen2", {"use_sliding_window": "false"}, "use_sliding_window is 'false', expected true"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": None},
        "max_window_layers is None",
    ),
    ("mistral", {"sliding_window": 0}, "sliding_window is 0, expected a positive number"),
    ("llama2", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config={'quant_m"),
    (
        "llama2",
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "says that bitsandbytes quantised the weights, but none is in 4 bits",
    ),
    ("llama2", {"vocab_size": 81}, r"shape \(80, 64\), but the config asks for \(81, 64\)"),
    ("llama2", {"head_dim": 32}, "has shape"),
]
