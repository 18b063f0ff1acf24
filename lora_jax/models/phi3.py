"""Phi-3 and Phi-4 as pure functions over a params tree.

Dimensions: B batch, T positions, D hidden, F intermediate, V vocabulary, L layers,
N query heads, K key/value heads, H head size.

The tree is a Llama's, but that queries, keys and values have one matrix, and so have gate and up,
as in the checkpoints: an adapter of PEFT on one of them has one A.

    embed [V, D]
    layers/attn_norm [L, D]
    layers/attn/{qkv_proj [L, D, (N + 2 K)*H], o_proj [L, N*H, D]}
    layers/mlp_norm [L, D]
    layers/mlp/{gate_up_proj [L, D, 2*F], down_proj [L, F, D]}
    norm [D]
    lm_head [D, V]                                           (absent where the embedding is tied)

Source: Phi-3 (arXiv:2404.14219, section 2), and transformers 5.24.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.models import leaves
from lora_jax.models.blocks import Heads, attention_output, projected, rms_norm, split_heads
from lora_jax.models.config import Attention, DecoderConfig
from lora_jax.models.config_fields import Windows, one_width, read_fields, written_fields
from lora_jax.models.config_json import ModelType, Stated
from lora_jax.models.decoder import forward as forward
from lora_jax.models.decoder import hidden_states as hidden_states
from lora_jax.models.decoder import init as init
from lora_jax.models.family import GGUF, Family, Parameter, Params
from lora_jax.models.rope_scaling import LongRopeScaling, longrope_amplitude


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phi3Config(DecoderConfig):
    """The shape of a Phi-3 or Phi-4. `windows` is for each layer the number of keys that a query
    sees; None, here or for a layer, is all."""

    windows: Windows | None = None

    @property
    def family(self) -> Family:
        return FAMILY

    @property
    def attention(self) -> Attention:
        return Attention(windows=self.windows)


def parameters(config: Phi3Config) -> tuple[Parameter, ...]:
    """The leaves of a model of this shape."""
    d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
    q, k = config.num_heads * h, config.num_kv_heads * h
    return (
        leaves.embedding(config),
        leaves.norm("attn_norm", d, "input_layernorm", "attn_norm"),
        leaves.matrix("attn/qkv_proj", q + 2 * k, d, "self_attn.qkv_proj", "attn_qkv"),
        leaves.matrix("attn/o_proj", d, q, "self_attn.o_proj", "attn_output"),
        leaves.norm("mlp_norm", d, "post_attention_layernorm", "ffn_norm"),
        leaves.matrix("mlp/gate_up_proj", 2 * f, d, "mlp.gate_up_proj", "ffn_up"),
        leaves.matrix("mlp/down_proj", d, f, "mlp.down_proj", "ffn_down"),
        leaves.last_norm(config),
        *leaves.head(config),
    )


def project(x_BTD: jax.Array, weights: Params, config: Phi3Config) -> Heads:
    """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]` of one layer."""
    x_BTD = rms_norm(x_BTD, weights["attn_norm"], config)
    N, K = config.num_heads, config.num_kv_heads
    y_BTMH = split_heads(projected(x_BTD, weights["attn"], "qkv"), N + 2 * K)
    q_BTNH, k_BTKH, v_BTKH = jnp.split(y_BTMH, [N, N + K], axis=2)
    return q_BTNH, k_BTKH, v_BTKH


def finish(
    x_BTD: jax.Array, attended_BTNH: jax.Array, weights: Params, config: Phi3Config
) -> jax.Array:
    """The rest of a layer after attention: the output projection, then the gated MLP."""
    x_BTD = x_BTD + attention_output(attended_BTNH, weights["attn"])
    x_BTD = checkpoint_name(x_BTD, "residual")
    y_BTD = rms_norm(x_BTD, weights["mlp_norm"], config)
    gate_up_BTF = checkpoint_name(projected(y_BTD, weights["mlp"], "gate_up"), "gate")
    gate_BTF, up_BTF = jnp.split(gate_up_BTF, 2, axis=-1)
    return x_BTD + projected(jax.nn.silu(gate_BTF) * up_BTF, weights["mlp"], "down")


def _read(stated: Stated) -> Phi3Config:
    fields = read_fields(stated, is_partial=True)
    scaling = fields["rope_scaling"]
    if scaling is not None and not isinstance(scaling, LongRopeScaling):
        raise ValueError(
            f"{stated.path}: the RoPE scaling {scaling.rope_type!r} in a phi3; transformers "
            "supports 'longrope' there."
        )
    width = None if stated.get("sliding_window") is None else stated.count("sliding_window")
    windows = (width,) * min(fields["num_layers"], 1 << 16) if width else None
    return Phi3Config(**fields, windows=windows)


def _config_json(config: Phi3Config) -> dict[str, Any]:
    """As transformers 4 takes it, too: a scaling of three keys, whose amplitude follows from both
    contexts."""
    if config.windows is not None and None in config.windows:
        raise ValueError(f"windows={config.windows}: a phi3 slides one window in all layers.")
    fields = written_fields(config)
    scaling = config.rope_scaling
    if isinstance(scaling, LongRopeScaling):
        original = scaling.original_context
        follows = longrope_amplitude(config.context_length / original, original)
        if scaling.attention_factor == follows:
            given = fields["rope_scaling"]
            kept = {key: given[key] for key in ("short_factor", "long_factor")}
            fields["rope_scaling"] = {"type": "longrope", **kept}
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        **fields,
        "partial_rotary_factor": config.rope.dims / config.head_dim,
        "sliding_window": one_width(config.windows),
        "hidden_act": "silu",
    }


def _from_gguf(
    architecture: str,
    fields: dict[str, Any],
    metadata: Mapping[str, Any],
    tensors: Collection[str],
) -> Phi3Config:
    del tensors
    width = metadata.get("attention.sliding_window", 0)
    if type(width) is not int or width < 0:
        raise ValueError(f"{architecture}.attention.sliding_window is {width!r}, not a count.")
    if fields["rope_scaling"] is None and metadata.get("rope.scaling.attn_factor", 1) != 1:
        raise ValueError(f"{architecture}.rope.scaling.attn_factor is given without factors.")
    windows = (width,) * min(fields["num_layers"], 1 << 16) if width else None
    return Phi3Config(**fields, windows=windows)


def _gguf_metadata(config: Phi3Config) -> dict[str, int | float]:
    """llama.cpp slides no window here: the context that it gets is the window."""
    width = one_width(config.windows)
    if width is None:
        return {"attention.sliding_window": 0}
    context = min(config.context_length, width)
    return {"attention.sliding_window": width, "context_length": context}


FAMILY = Family(
    parameters=parameters,
    project=project,
    finish=finish,
    norm=rms_norm,
    model_types={
        "phi3": ModelType(
            architecture="Phi3ForCausalLM",
            read=_read,
            defaults={
                "max_position_embeddings": 4096,
                "original_max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
            },
            reads=frozenset({"partial_rotary_factor"}),
            supported={
                "resid_pdrop": (0,),
                "embd_pdrop": (0,),
                "attention_bias": (False,),
                "mlp_bias": (False,),
                "full_attn_mod": (1,),
                "interpolate_factor": (1,),
                "lm_head_bias": (False,),
            },
        )
    },
    config_json=_config_json,
    gguf=GGUF(
        architectures=("phi3",),
        architecture_of=lambda config: "phi3",
        read=_from_gguf,
        metadata=_gguf_metadata,
        reads=frozenset(
            {"attention.sliding_window", "rope.dimension_count", "rope.scaling.attn_factor"}
        ),
    ),
    shapes={
        "phi-4": Phi3Config(
            vocab_size=100_352,
            hidden_size=5120,
            intermediate_size=17_920,
            num_layers=40,
            num_heads=40,
            num_kv_heads=10,
            head_dim=128,
            context_length=16_384,
            rope_theta=250_000.0,
        )
    },
)
