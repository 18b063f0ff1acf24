"""Gemma 2 as pure functions over a params tree.

Dimensions: B batch, T positions, D hidden, F intermediate, V vocabulary, L layers,
N query heads, K key/value heads, H head size.

The tree is a Llama's, with two more norms a layer:

    embed [V, D]
    layers/{attn_norm, attn_post_norm, mlp_norm, mlp_post_norm} [L, D]
    layers/attn/{q_proj [L, D, N*H], k_proj [L, D, K*H], v_proj [L, D, K*H], o_proj [L, N*H, D]}
    layers/mlp/{gate_proj [L, D, F], up_proj [L, D, F], down_proj [L, F, D]}
    norm [D]
    lm_head [D, V]                                           (absent where the embedding is tied)

Source: Gemma 2 (arXiv:2408.00118, section 2), and transformers 5.24 for the order of roundings.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.models.blocks import gated_mlp, normalized, rotated_heads
from lora_jax.models.config import Attention, DecoderConfig
from lora_jax.models.config_fields import FULL, SLIDING, layer_types, read_fields, written_fields
from lora_jax.models.config_json import ModelType, Stated
from lora_jax.models.decoder import forward as forward
from lora_jax.models.decoder import hidden_states as hidden_states
from lora_jax.models.decoder import init as init
from lora_jax.models.family import Family, Parameter, Params, plain_embed, plain_read_out
from lora_jax.models.mixed_dtypes import product


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2Config(DecoderConfig):
    """The shape of a Gemma 2.

    Scores are scaled by `1 / sqrt(attention_scalar)` and capped at `attention_cap`, logits at
    `logit_cap` (None leaves them as they are). `windows` is for each layer the number of keys that
    a query sees; None, here or for a layer, is all.
    """

    attention_scalar: int
    attention_cap: float | None = 50.0
    logit_cap: float | None = 30.0
    windows: tuple[int | None, ...] | None = None

    @property
    def family(self) -> Family:
        return FAMILY

    @property
    def attention(self) -> Attention:
        scale = self.attention_scalar**-0.5
        return Attention(scale=scale, cap=self.attention_cap, windows=self.windows)


def parameters(config: Gemma2Config) -> tuple[Parameter, ...]:
    """The leaves of a model of this shape."""
    d, f, v, h = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    q, k = config.num_heads * h, config.num_kv_heads * h
    layer = "model.layers.{}."
    attn, mlp = layer + "self_attn.", layer + "mlp."

    def norm(path, name):
        return Parameter(path, (d,), f"{name}.weight", initial=0.0)

    head = [Parameter("lm_head", (v, d), "lm_head.weight")]
    return (
        Parameter("embed", (v, d), "model.embed_tokens.weight"),
        norm("layers/attn_norm", layer + "input_layernorm"),
        Parameter("layers/attn/q_proj", (q, d), attn + "q_proj.weight"),
        Parameter("layers/attn/k_proj", (k, d), attn + "k_proj.weight"),
        Parameter("layers/attn/v_proj", (k, d), attn + "v_proj.weight"),
        Parameter("layers/attn/o_proj", (d, q), attn + "o_proj.weight"),
        norm("layers/attn_post_norm", layer + "post_attention_layernorm"),
        norm("layers/mlp_norm", layer + "pre_feedforward_layernorm"),
        Parameter("layers/mlp/gate_proj", (f, d), mlp + "gate_proj.weight"),
        Parameter("layers/mlp/up_proj", (f, d), mlp + "up_proj.weight"),
        Parameter("layers/mlp/down_proj", (d, f), mlp + "down_proj.weight"),
        norm("layers/mlp_post_norm", layer + "post_feedforward_layernorm"),
        norm("norm", "model.norm"),
        *(() if config.tie_embeddings else head),
    )


def scaled_embed(tokens_BT: jax.Array, table: Any, config: Gemma2Config) -> jax.Array:
    """`sqrt(D) * table[tokens]`."""
    x_BTD = plain_embed(tokens_BT, table, config)
    return x_BTD * jnp.asarray(math.sqrt(config.hidden_size), x_BTD.dtype)


def project(
    x_BTD: jax.Array, weights: Params, positions_BT: jax.Array, config: Gemma2Config
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]` of one layer, rotated by position."""
    attn = weights["attn"]
    x_BTD = rms_norm(x_BTD, weights["attn_norm"], config)

    def heads(name, count):
        y = product(x_BTD, attn[f"{name}_proj"])
        return y.reshape(*x_BTD.shape[:2], count, config.head_dim)

    return rotated_heads(heads, positions_BT, config)


def finish(
    x_BTD: jax.Array, attended_BTNH: jax.Array, weights: Params, config: Gemma2Config
) -> jax.Array:
    """The rest of a layer: output projection and gated MLP, each normed before it is added."""
    attended_BTE = attended_BTNH.reshape(*x_BTD.shape[:2], -1)
    y_BTD = product(attended_BTE, weights["attn"]["o_proj"])
    x_BTD = checkpoint_name(x_BTD + rms_norm(y_BTD, weights["attn_post_norm"], config), "residual")
    y_BTD = rms_norm(x_BTD, weights["mlp_norm"], config)
    y_BTD = gated_mlp(y_BTD, weights["mlp"], jax.nn.gelu)  # the tanh approximation
    return x_BTD + rms_norm(y_BTD, weights["mlp_post_norm"], config)


def rms_norm(x: jax.Array, scale: jax.Array, config: Gemma2Config) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * (1 + scale)` over the last axis, in float32, cast last."""
    normed = normalized(x, config.norm_eps)
    return (normed * jnp.broadcast_to(1 + scale.astype(jnp.float32), x.shape)).astype(x.dtype)


def capped_read_out(x_BTD: jax.Array, head: Any, config: Gemma2Config) -> jax.Array:
    """`cap * tanh(x @ head / cap)`."""
    logits_BTV = plain_read_out(x_BTD, head, config)
    cap = config.logit_cap
    return logits_BTV if cap is None else jnp.tanh(logits_BTV / cap) * cap


def _read(stated: Stated) -> Gemma2Config:
    fields = read_fields(stated)
    count = fields["num_layers"]
    layers = layer_types(stated, count) or [FULL if i % 2 else SLIDING for i in range(count)]
    window = stated.count("sliding_window") if SLIDING in layers else None
    caps: dict[str, Any] = {
        name: None if stated.get(key) is None else stated.number(key)
        for name, key in (
            ("attention_cap", "attn_logit_softcapping"),
            ("logit_cap", "final_logit_softcapping"),
        )
    }
    return Gemma2Config(
        **fields,
        **caps,
        attention_scalar=stated.count("query_pre_attn_scalar"),
        windows=tuple(window if layer == SLIDING else None for layer in layers),
    )


def _config_json(config: Gemma2Config) -> dict[str, Any]:
    windows = config.windows or (None,) * config.num_layers
    sliding = {window for window in windows if window is not None}
    if len(sliding) > 1:
        raise ValueError(f"windows={windows}: a config.json of Gemma 2 has one width for all.")
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **written_fields(config),
        "query_pre_attn_scalar": config.attention_scalar,
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logit_cap,
        "sliding_window": next(iter(sliding), None),
        "layer_types": [FULL if window is None else SLIDING for window in windows],
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    }


FAMILY = Family(
    parameters=parameters,
    project=project,
    finish=finish,
    norm=rms_norm,
    embed=scaled_embed,
    read_out=capped_read_out,
    model_types={
        "gemma2": ModelType(
            architecture="Gemma2ForCausalLM",
            read=_read,
            defaults={
                "max_position_embeddings": 8192,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "sliding_window": 4096,
                "query_pre_attn_scalar": 256,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
                "tie_word_embeddings": True,
            },
            reads=frozenset(
                {
                    "query_pre_attn_scalar",
                    "attn_logit_softcapping",
                    "final_logit_softcapping",
                    "cache_implementation",
                }
            ),
            supported={
                "hidden_activation": ("gelu_pytorch_tanh",),
                "hidden_act": ("gelu_pytorch_tanh", "gelu"),  # which no Gemma 2 reads
                "attention_bias": (False,),
                "use_bidirectional_attention": (False,),
            },
        )
    },
    config_json=_config_json,
    shapes={
        "gemma-2-2b": Gemma2Config(
            vocab_size=256_000,
            hidden_size=2304,
            intermediate_size=9216,
            num_layers=26,
            num_heads=8,
            num_kv_heads=4,
            head_dim=256,
            context_length=8192,
            norm_eps=1e-6,
            tie_embeddings=True,
            attention_scalar=256,
            windows=(4096, None) * 13,
        )
    },
)
