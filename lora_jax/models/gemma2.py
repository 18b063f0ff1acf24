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

Source: Gemma 2 (arXiv:2408.00118, section 2).
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from lora_jax.models import leaves
from lora_jax.models.blocks import Heads, attention_heads
from lora_jax.models.config import Attention, DecoderConfig
from lora_jax.models.config_fields import (
    FULL,
    SLIDING,
    Windows,
    layer_types,
    read_fields,
    windows_of,
    written_fields,
    written_windows,
)
from lora_jax.models.config_json import ModelType, Stated
from lora_jax.models.decoder import forward as forward
from lora_jax.models.decoder import hidden_states as hidden_states
from lora_jax.models.decoder import init as init
from lora_jax.models.family import GGUF, Family, Parameter, Params
from lora_jax.models.gemma_blocks import capped_read_out, finish, rms_norm, scaled_embed
from lora_jax.models.gemma_gguf import gemma_metadata, gguf_scalar, gguf_windows

_CAPS = {"attn": 50.0, "final": 30.0}
_PERIOD, _WIDE = 2, 46  # of windows in llama.cpp, and the layers of its 27B


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
    windows: Windows | None = None

    @property
    def family(self) -> Family:
        return FAMILY

    @property
    def attention(self) -> Attention:
        scale = self.attention_scalar**-0.5
        return Attention(scale=scale, cap=self.attention_cap, windows=self.windows)


def parameters(config: Gemma2Config) -> tuple[Parameter, ...]:
    """The leaves of a model of this shape."""
    return (
        leaves.embedding(config),
        *leaves.gemma_layer(config),
        leaves.last_norm(config, from_zero=True),
        *leaves.head(config),
    )


def project(x_BTD: jax.Array, weights: Params, config: Gemma2Config) -> Heads:
    """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]` of one layer."""
    x_BTD = rms_norm(x_BTD, weights["attn_norm"], config)
    return attention_heads(x_BTD, weights["attn"], config)


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
        windows=windows_of(layers, window),
    )


def _config_json(config: Gemma2Config) -> dict[str, Any]:
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **written_fields(config),
        "query_pre_attn_scalar": config.attention_scalar,
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logit_cap,
        **written_windows(config.windows, config.num_layers),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    }


def _from_gguf(
    architecture: str,
    fields: dict[str, Any],
    metadata: Mapping[str, Any],
    tensors: Collection[str],
) -> Gemma2Config:
    del architecture, tensors
    caps = [metadata.get(f"{name}_logit_softcapping", cap) for name, cap in _CAPS.items()]
    if not all(isinstance(cap, float) and cap > 0 for cap in caps):
        raise ValueError(f"the caps of attention and logits are {caps}, expected positive floats.")
    return Gemma2Config(
        **fields,
        attention_cap=float(str(np.float32(caps[0]))),
        logit_cap=float(str(np.float32(caps[1]))),
        attention_scalar=gguf_scalar(fields, _WIDE),
        windows=gguf_windows(fields, metadata, _PERIOD),
    )


def _gguf_metadata(config: Gemma2Config) -> dict[str, int | float]:
    caps = config.attention_cap, config.logit_cap
    if None in caps or not config.tie_embeddings:
        raise ValueError(
            f"caps of {caps} and tie_embeddings={config.tie_embeddings}: llama.cpp computes a "
            "gemma2 with both caps and a tied head. Write a Hugging Face folder, "
            "save_huggingface(folder, model)."
        )
    named = zip(_CAPS, caps, strict=True)
    keys = {f"{name}_logit_softcapping": float(cap) for name, cap in named if cap}
    return gemma_metadata(config, _PERIOD, _WIDE) | keys


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
    gguf=GGUF(
        architectures=("gemma2",),
        architecture_of=lambda config: "gemma2",
        read=_from_gguf,
        metadata=_gguf_metadata,
        reads=frozenset(
            {"attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
        ),
    ),
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
