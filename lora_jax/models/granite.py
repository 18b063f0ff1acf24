"""Granite 3 as pure functions over a params tree.

Dimensions: B batch, T positions, D hidden, V vocabulary, L layers, N query heads, K key/value
heads, H head size.

The tree is a Llama's; the model scales the embedding, the scores, what a layer adds and the logits
by four numbers.

Source: Granite 3.0 (github.com/ibm-granite/granite-3.0-language-models, paper.pdf, section 2), and
transformers 5.24 for the order of roundings.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lora_jax.models import leaves
from lora_jax.models.blocks import Heads, attention_heads, attention_output, gated_mlp, rms_norm
from lora_jax.models.config import Attention, DecoderConfig
from lora_jax.models.config_fields import read_fields, written_fields
from lora_jax.models.config_json import ModelType, Stated
from lora_jax.models.decoder import forward as forward
from lora_jax.models.decoder import hidden_states as hidden_states
from lora_jax.models.decoder import init as init
from lora_jax.models.family import GGUF, Family, Parameter, Params, plain_embed, plain_read_out

# Our names of the four, transformers', llama.cpp's.
_SCALES = (
    ("embedding_scale", "embedding_multiplier", "embedding_scale"),
    ("attention_scale", "attention_multiplier", "attention.scale"),
    ("residual_scale", "residual_multiplier", "residual_scale"),
    ("logit_divisor", "logits_scaling", "logit_scale"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraniteConfig(DecoderConfig):
    """The shape of a Granite.

    `embedding_scale` multiplies embedded tokens, `attention_scale` scores, in place of
    `1 / sqrt(H)`, and `residual_scale` what attention and MLP add; logits are divided by
    `logit_divisor`. `attention_bias` adds biases to the four projections of attention, `mlp_bias`
    to the three of the MLP.
    """

    embedding_scale: float = 1.0
    attention_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def family(self) -> Family:
        return FAMILY

    @property
    def attention(self) -> Attention:
        return Attention(scale=self.attention_scale)


def parameters(config: GraniteConfig) -> tuple[Parameter, ...]:
    """The leaves of a model of this shape."""
    biases = (*leaves.qkv_biases(config), *leaves.output_bias(config))
    return (
        leaves.embedding(config),
        *leaves.llama_layer(config),
        leaves.last_norm(config),
        *(biases if config.attention_bias else ()),
        *(leaves.mlp_biases(config) if config.mlp_bias else ()),
        *leaves.head(config),
    )


def scaled_embed(tokens_BT: jax.Array, table: Any, config: GraniteConfig) -> jax.Array:
    """`embedding_scale * table[tokens]`."""
    return plain_embed(tokens_BT, table, config) * config.embedding_scale


def project(x_BTD: jax.Array, weights: Params, config: GraniteConfig) -> Heads:
    """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]` of one layer."""
    x_BTD = rms_norm(x_BTD, weights["attn_norm"], config)
    return attention_heads(x_BTD, weights["attn"], config)


def finish(
    x_BTD: jax.Array, attended_BTNH: jax.Array, weights: Params, config: GraniteConfig
) -> jax.Array:
    """The rest of a layer: output projection and gated MLP, each scaled before it is added."""
    scale = config.residual_scale
    x_BTD = x_BTD + attention_output(attended_BTNH, weights["attn"]) * scale
    x_BTD = checkpoint_name(x_BTD, "residual")
    y_BTD = rms_norm(x_BTD, weights["mlp_norm"], config)
    return x_BTD + gated_mlp(y_BTD, weights["mlp"], jax.nn.silu) * scale


def scaled_read_out(x_BTD: jax.Array, head: Any, config: GraniteConfig) -> jax.Array:
    """`x @ head / logit_divisor`."""
    return plain_read_out(x_BTD, head, config) / config.logit_divisor


def _read(stated: Stated) -> GraniteConfig:
    scales: dict[str, Any] = {name: float(stated.number(key, 1.0)) for name, key, _ in _SCALES}
    return GraniteConfig(
        **read_fields(stated),
        **scales,
        attention_bias=stated.switch("attention_bias"),
        mlp_bias=stated.switch("mlp_bias"),
    )


def _config_json(config: GraniteConfig) -> dict[str, Any]:
    return {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        **written_fields(config),
        **{key: getattr(config, name) for name, key, _ in _SCALES},
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def _from_gguf(
    architecture: str,
    fields: dict[str, Any],
    metadata: Mapping[str, Any],
    tensors: Collection[str],
) -> GraniteConfig:
    # llama.cpp takes 1 / sqrt(H) where the scale of scores is missing, and 1 for the others.
    missing = {"attention.scale": fields["head_dim"] ** -0.5}
    scales: dict[str, Any] = {}
    for name, _, key in _SCALES:
        value = metadata.get(key) or missing.get(key, 1.0)
        if not isinstance(value, float) or not 0 < value < 1e30:
            raise ValueError(f"{architecture}.{key} is {value!r}, expected a positive float.")
        scales[name] = float(str(np.float32(value)))
    return GraniteConfig(
        **fields,
        **scales,
        attention_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
    )


FAMILY = Family(
    parameters=parameters,
    project=project,
    finish=finish,
    norm=rms_norm,
    embed=scaled_embed,
    read_out=scaled_read_out,
    model_types={
        "granite": ModelType(
            architecture="GraniteForCausalLM",
            read=_read,
            defaults={"max_position_embeddings": 2048},
            reads=frozenset(key for _, key, _ in _SCALES),
        )
    },
    config_json=_config_json,
    gguf=GGUF(
        architectures=("granite",),
        architecture_of=lambda config: "granite",
        read=_from_gguf,
        metadata=lambda config: {key: float(getattr(config, name)) for name, _, key in _SCALES},
        reads=frozenset(key for _, _, key in _SCALES),
        interleaved=frozenset({"granite"}),
    ),
    shapes={
        "granite-3.3-2b": GraniteConfig(
            vocab_size=49_159,
            hidden_size=2048,
            intermediate_size=8192,
            num_layers=40,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
            context_length=131_072,
            rope_theta=1e7,
            tie_embeddings=True,
            embedding_scale=12.0,
            attention_scale=0.015625,
            residual_scale=0.22,
            logit_divisor=8.0,
        )
    },
)
