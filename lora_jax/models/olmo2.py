"""OLMo 2 as pure functions over a params tree.

Dimensions: B batch, T positions, D hidden, F intermediate, V vocabulary, L layers,
N query heads, K key/value heads, H head size.

The tree is a Llama's, with norms behind attention and the MLP rather than in front of them, and
norms over all queries and all keys of a position:

    embed [V, D]
    layers/{attn_post_norm, mlp_post_norm} [L, D]
    layers/attn/{q_proj [L, D, N*H], k_proj [L, D, K*H], v_proj [L, D, K*H], o_proj [L, N*H, D]}
    layers/attn/{q_norm [L, N*H], k_norm [L, K*H]}
    layers/mlp/{gate_proj [L, D, F], up_proj [L, D, F], down_proj [L, F, D]}
    norm [D]
    lm_head [D, V]                                           (absent where the embedding is tied)

Source: OLMo 2 (arXiv:2501.00656, section 2.1), and transformers 5.24 for the order of roundings.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.models import leaves
from lora_jax.models.blocks import (
    Heads,
    attention_output,
    gated_mlp,
    normalized,
    projected,
    split_heads,
)
from lora_jax.models.config import DecoderConfig
from lora_jax.models.config_fields import read_fields, written_fields
from lora_jax.models.config_json import ModelType, Stated
from lora_jax.models.decoder import forward as forward
from lora_jax.models.decoder import hidden_states as hidden_states
from lora_jax.models.decoder import init as init
from lora_jax.models.family import GGUF, Family, Parameter, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Olmo2Config(DecoderConfig):
    """The shape of an OLMo 2; `attention_bias` adds biases to all four projections."""

    attention_bias: bool = False

    @property
    def family(self) -> Family:
        return FAMILY


def parameters(config: Olmo2Config) -> tuple[Parameter, ...]:
    """The leaves of a model of this shape."""
    d, h = config.hidden_size, config.head_dim
    q, k = config.num_heads * h, config.num_kv_heads * h
    biases = (*leaves.qkv_biases(config), *leaves.output_bias(config))
    return (
        leaves.embedding(config),
        *leaves.attention(config),
        leaves.norm("attn/q_norm", q, "self_attn.q_norm", "attn_q_norm"),
        leaves.norm("attn/k_norm", k, "self_attn.k_norm", "attn_k_norm"),
        leaves.norm("attn_post_norm", d, "post_attention_layernorm", "post_attention_norm"),
        *leaves.gated_mlp(config),
        leaves.norm("mlp_post_norm", d, "post_feedforward_layernorm", "post_ffw_norm"),
        leaves.last_norm(config),
        *(biases if config.attention_bias else ()),
        *leaves.head(config),
    )


def project(x_BTD: jax.Array, weights: Params, config: Olmo2Config) -> Heads:
    """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]` of one layer."""
    attn = weights["attn"]
    q_BTE, k_BTE = (
        rms_norm(
            checkpoint_name(projected(x_BTD, attn, name), "projected"),
            attn[f"{name}_norm"],
            config,
        )
        for name in ("q", "k")
    )
    v_BTE = projected(x_BTD, attn, "v")
    heads, kv_heads = config.num_heads, config.num_kv_heads
    return split_heads(q_BTE, heads), split_heads(k_BTE, kv_heads), split_heads(v_BTE, kv_heads)


def finish(
    x_BTD: jax.Array, attended_BTNH: jax.Array, weights: Params, config: Olmo2Config
) -> jax.Array:
    """The rest of a layer: output projection and gated MLP, each normed before it is added."""
    y_BTD = attention_output(attended_BTNH, weights["attn"])
    x_BTD = checkpoint_name(x_BTD + rms_norm(y_BTD, weights["attn_post_norm"], config), "residual")
    y_BTD = gated_mlp(x_BTD, weights["mlp"], jax.nn.silu)
    return x_BTD + rms_norm(y_BTD, weights["mlp_post_norm"], config)


def rms_norm(x: jax.Array, scale: jax.Array, config: Olmo2Config) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32, cast last."""
    wide = jnp.broadcast_to(scale.astype(jnp.float32), x.shape)
    return (normalized(x, config.norm_eps) * wide).astype(x.dtype)


def _read(stated: Stated) -> Olmo2Config:
    return Olmo2Config(**read_fields(stated), attention_bias=stated.switch("attention_bias"))


def _config_json(config: Olmo2Config) -> dict[str, Any]:
    return {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        **written_fields(config),
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
    }


def _gguf_metadata(config: Olmo2Config) -> dict[str, int | float]:
    if config.attention_bias:
        raise ValueError("llama.cpp reads no biases of attention in an olmo2.")
    return {}


FAMILY = Family(
    parameters=parameters,
    project=project,
    finish=finish,
    norm=rms_norm,
    model_types={
        "olmo2": ModelType(
            architecture="Olmo2ForCausalLM",
            read=_read,
            defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        )
    },
    config_json=_config_json,
    gguf=GGUF(
        architectures=("olmo2",),
        architecture_of=lambda config: "olmo2",
        read=lambda architecture, fields, metadata, tensors: Olmo2Config(**fields),
        metadata=_gguf_metadata,
    ),
    shapes={
        "olmo-2-1b": Olmo2Config(
            vocab_size=100_352,
            hidden_size=2048,
            intermediate_size=8192,
            num_layers=16,
            num_heads=16,
            num_kv_heads=16,
            head_dim=128,
            context_length=4096,
            rope_theta=500_000.0,
            norm_eps=1e-6,
        )
    },
)
