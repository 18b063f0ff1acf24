"""Gemma 3's text models as pure functions over a params tree.

Dimensions: B batch, T positions, D hidden, V vocabulary, L layers, N query heads, K key/value
heads, H head size.

The tree is a Gemma 2's, with norms of the heads of queries and keys:

    embed [V, D]
    layers/{attn_norm, attn_post_norm, mlp_norm, mlp_post_norm} [L, D]
    layers/attn/{q_proj [L, D, N*H], k_proj [L, D, K*H], v_proj [L, D, K*H], o_proj [L, N*H, D]}
    layers/attn/{q_norm, k_norm} [L, H]
    layers/mlp/{gate_proj [L, D, F], up_proj [L, D, F], down_proj [L, F, D]}
    norm [D]
    lm_head [D, V]                                           (absent where the embedding is tied)

Layers that slide a window have a RoPE of their own, that of local layers.

Source: Gemma 3 (arXiv:2503.19786, section 2).
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax

from lora_jax.models import leaves
from lora_jax.models.blocks import Heads, attention_heads
from lora_jax.models.config import Attention, DecoderConfig, Rope
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
from lora_jax.models.config_rope import rope_of
from lora_jax.models.decoder import forward as forward
from lora_jax.models.decoder import hidden_states as hidden_states
from lora_jax.models.decoder import init as init
from lora_jax.models.family import GGUF, Family, Parameter, Params
from lora_jax.models.gemma_blocks import capped_read_out, finish, rms_norm, scaled_embed
from lora_jax.models.gemma_gguf import gemma_metadata, gguf_scalar, gguf_windows

_LOCAL, _PERIOD, _WIDE = 10_000.0, 6, 62  # llama.cpp's RoPE of local layers, its period, its 27B


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(DecoderConfig):
    """The shape of a Gemma 3.

    Scores are scaled by `1 / sqrt(attention_scalar)`, logits capped at `logit_cap` (None leaves
    them as they are). `windows` is for each layer the number of keys that a query sees, None for
    all; layers with a window have RoPE of base `local_theta`.
    """

    attention_scalar: int
    logit_cap: float | None = None
    windows: Windows | None = None
    local_theta: float = _LOCAL

    @property
    def family(self) -> Family:
        return FAMILY

    @property
    def attention(self) -> Attention:
        return Attention(scale=self.attention_scalar**-0.5, windows=self.windows)

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        local = Rope(theta=self.local_theta, dims=self.rope.dims)
        windows = self.windows or (None,) * self.num_layers
        return tuple(self.rope if window is None else local for window in windows)


def parameters(config: Gemma3Config) -> tuple[Parameter, ...]:
    """The leaves of a model of this shape."""
    return (
        leaves.embedding(config),
        *leaves.gemma_layer(config),
        *leaves.head_norms(config, from_zero=True),
        leaves.last_norm(config, from_zero=True),
        *leaves.head(config),
    )


def project(x_BTD: jax.Array, weights: Params, config: Gemma3Config) -> Heads:
    """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]` of one layer."""
    x_BTD = rms_norm(x_BTD, weights["attn_norm"], config)
    return attention_heads(x_BTD, weights["attn"], config, rms_norm)


def _read(stated: Stated) -> Gemma3Config:
    full, local = (_part(stated, kind) for kind in (FULL, SLIDING))
    fields = read_fields(full, default_theta=1e6)
    local_rope = rope_of(local, default_theta=_LOCAL)
    if local_rope.scaling is not None:
        raise ValueError(
            f"{stated.path}: the RoPE of {SLIDING} is scaled by {local_rope.scaling}; supported: "
            "none."
        )
    count, period = fields["num_layers"], stated.count("sliding_window_pattern", _PERIOD)
    layers = layer_types(stated, count) or [
        SLIDING if (i + 1) % period else FULL for i in range(min(count, 1 << 16))
    ]
    window = stated.count("sliding_window") if SLIDING in layers else None
    cap = stated.get("final_logit_softcapping")
    return Gemma3Config(
        **fields,
        attention_scalar=stated.count("query_pre_attn_scalar"),
        logit_cap=None if cap is None else stated.number("final_logit_softcapping"),
        windows=windows_of(layers, window),
        local_theta=local_rope.theta,
    )


def _part(stated: Stated, kind: str) -> Stated:
    """The values with one RoPE, that of the layers of a kind, which has its own keys, or its own
    object in rope_parameters."""
    values = dict(stated.values)
    nested = values.pop("rope_parameters", None)
    if isinstance(nested, dict) and nested.keys() & {FULL, SLIDING}:
        if unknown := nested.keys() - {FULL, SLIDING}:
            raise ValueError(
                f"{stated.path}: unknown {', '.join(map(str, sorted(unknown)))} in rope_parameters "
                f"beside {FULL} and {SLIDING}; remove it."
            )
        values["rope_parameters"] = nested.get(kind)
    elif nested is not None:
        raise ValueError(
            f"{stated.path}: rope_parameters={nested!r}, expected an object for {FULL} and one for "
            f"{SLIDING}."
        )
    local_theta = values.pop("rope_local_base_freq", None)
    if kind == SLIDING:
        values |= {"rope_theta": local_theta, "rope_scaling": None}
    return dataclasses.replace(stated, values=values)


def _config_json(config: Gemma3Config) -> dict[str, Any]:
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **written_fields(config),
        "rope_local_base_freq": config.local_theta,
        "query_pre_attn_scalar": config.attention_scalar,
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
) -> Gemma3Config:
    del architecture, tensors
    return Gemma3Config(
        **fields,
        attention_scalar=gguf_scalar(fields, _WIDE),
        windows=gguf_windows(fields, metadata, _PERIOD),
    )


def _gguf_metadata(config: Gemma3Config) -> dict[str, int | float]:
    if config.local_theta != _LOCAL or config.logit_cap is not None:
        raise ValueError(
            f"local_theta={config.local_theta}, logit_cap={config.logit_cap}: llama.cpp computes a "
            f"gemma3 with {_LOCAL} and None. Write a Hugging Face folder, "
            "save_huggingface(folder, model)."
        )
    return gemma_metadata(config, _PERIOD, _WIDE)


FAMILY = Family(
    parameters=parameters,
    project=project,
    finish=finish,
    norm=rms_norm,
    embed=scaled_embed,
    read_out=capped_read_out,
    model_types={
        "gemma3_text": ModelType(
            architecture="Gemma3ForCausalLM",
            read=_read,
            defaults={
                "max_position_embeddings": 131_072,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "sliding_window": 4096,
                "query_pre_attn_scalar": 256,
                "tie_word_embeddings": True,
            },
            reads=frozenset(
                {
                    "query_pre_attn_scalar",
                    "final_logit_softcapping",
                    "cache_implementation",
                    "rope_local_base_freq",
                    "sliding_window_pattern",
                }
            ),
            supported={
                "hidden_activation": ("gelu_pytorch_tanh",),
                "hidden_act": ("gelu_pytorch_tanh", "gelu"),  # which no Gemma 3 reads
                "attention_bias": (False,),
                "use_bidirectional_attention": (False,),
            },
        )
    },
    config_json=_config_json,
    gguf=GGUF(
        architectures=("gemma3",),
        architecture_of=lambda config: "gemma3",
        read=_from_gguf,
        metadata=_gguf_metadata,
        reads=frozenset({"attention.sliding_window"}),
    ),
    shapes={
        "gemma-3-1b": Gemma3Config(
            vocab_size=262_144,
            hidden_size=1152,
            intermediate_size=6912,
            num_layers=26,
            num_heads=4,
            num_kv_heads=1,
            head_dim=256,
            context_length=32_768,
            rope_theta=1e6,
            norm_eps=1e-6,
            tie_embeddings=True,
            attention_scalar=256,
            windows=(((512,) * 5 + (None,)) * 5)[:26],
        )
    },
)
