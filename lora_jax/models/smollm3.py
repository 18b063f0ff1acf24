"""SmolLM3 as pure functions over a params tree.

Dimensions: B batch, T positions, D hidden, L layers, N query heads, K key/value heads, H head size.

The tree is a Llama's, and so is the model, but that some layers have no RoPE (NoPE,
arXiv:2501.18795).

Source: transformers 5.24.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax

from lora_jax.models import leaves
from lora_jax.models.blocks import Heads, attention_heads, finish, rms_norm
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
from lora_jax.models.decoder import forward as forward
from lora_jax.models.decoder import hidden_states as hidden_states
from lora_jax.models.decoder import init as init
from lora_jax.models.family import GGUF, Family, Parameter, Params

_PERIOD = 4  # of layers without RoPE, in llama.cpp and in the released model
_MOST = 1 << 16  # layers; a config that claims more is refused by its tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmolLM3Config(DecoderConfig):
    """The shape of a SmolLM3.

    `nope` is for each layer whether it has no RoPE. `windows` is for each the number of keys that
    a query sees, None for all. `attention_bias` adds biases to the four projections of attention,
    `mlp_bias` to the three of the MLP.
    """

    nope: tuple[bool, ...]
    windows: Windows | None = None
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        super().__post_init__()
        if len(self.nope) != self.num_layers:
            raise ValueError(
                f"nope has {len(self.nope)} entries for {self.num_layers} layers, expected one a "
                "layer."
            )

    @property
    def family(self) -> Family:
        return FAMILY

    @property
    def attention(self) -> Attention:
        return Attention(windows=self.windows)

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        return tuple(None if bare else self.rope for bare in self.nope)


def parameters(config: SmolLM3Config) -> tuple[Parameter, ...]:
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


def project(x_BTD: jax.Array, weights: Params, config: SmolLM3Config) -> Heads:
    """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]` of one layer."""
    x_BTD = rms_norm(x_BTD, weights["attn_norm"], config)
    return attention_heads(x_BTD, weights["attn"], config)


def _read(stated: Stated) -> SmolLM3Config:
    fields = read_fields(stated, default_theta=2e6)
    nope = _nope(stated, fields["num_layers"])
    slides = stated.switch("use_sliding_window") and stated.get("sliding_window") is not None
    layers = layer_types(stated, fields["num_layers"])
    if layers is None:
        layers = [SLIDING if slides and bare else FULL for bare in nope]
    if SLIDING in layers and not slides:
        raise ValueError(
            f"{stated.path}: layer_types names {SLIDING!r} without a sliding_window in use."
        )
    return SmolLM3Config(
        **fields,
        nope=nope,
        windows=windows_of(layers, stated.count("sliding_window") if slides else None),
        attention_bias=stated.switch("attention_bias"),
        mlp_bias=stated.switch("mlp_bias"),
    )


def _nope(stated: Stated, num_layers: int) -> tuple[bool, ...]:
    """From no_rope_layers, whose ones are layers with RoPE, or else from a period."""
    given = stated.get("no_rope_layers")
    if given is None:
        return _periodic(num_layers, stated.count("no_rope_layer_interval", _PERIOD))
    if not isinstance(given, list) or len(given) < num_layers or set(given) - {0, 1}:
        raise ValueError(
            f"{stated.path}: no_rope_layers is {given!r}, expected {num_layers} times 1, for a "
            "layer with RoPE, or 0."
        )
    return tuple(not has_rope for has_rope in given[:num_layers])


def _periodic(num_layers: int, period: int) -> tuple[bool, ...]:
    return tuple((i + 1) % period == 0 for i in range(min(num_layers, _MOST)))


def _config_json(config: SmolLM3Config) -> dict[str, Any]:
    return {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        **written_fields(config),
        "no_rope_layers": [int(not bare) for bare in config.nope],
        "use_sliding_window": config.windows is not None,
        **written_windows(config.windows, config.num_layers),
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def _from_gguf(
    architecture: str,
    fields: dict[str, Any],
    metadata: Mapping[str, Any],
    tensors: Collection[str],
) -> SmolLM3Config:
    del architecture, metadata, tensors
    return SmolLM3Config(**fields, nope=_periodic(fields["num_layers"], _PERIOD))


def _gguf_metadata(config: SmolLM3Config) -> dict[str, int | float]:
    has_more = config.windows is not None or config.attention_bias or config.mlp_bias
    if has_more or config.nope != _periodic(config.num_layers, _PERIOD):
        raise ValueError(
            f"llama.cpp computes a smollm3 without biases and windows, and without RoPE in every "
            f"{_PERIOD}th layer; this one is {config}. Write a Hugging Face folder, "
            "save_huggingface(folder, model)."
        )
    return {}


FAMILY = Family(
    parameters=parameters,
    project=project,
    finish=finish,
    norm=rms_norm,
    model_types={
        "smollm3": ModelType(
            architecture="SmolLM3ForCausalLM",
            read=_read,
            defaults={
                "max_position_embeddings": 32_768,
                "num_key_value_heads": 4,
                "tie_word_embeddings": True,
            },
            reads=frozenset({"no_rope_layers", "no_rope_layer_interval"}),
        )
    },
    config_json=_config_json,
    gguf=GGUF(
        architectures=("smollm3",),
        architecture_of=lambda config: "smollm3",
        read=_from_gguf,
        metadata=_gguf_metadata,
        interleaved=frozenset({"smollm3"}),
    ),
    shapes={
        "smollm3-3b": SmolLM3Config(
            vocab_size=128_256,
            hidden_size=2048,
            intermediate_size=11_008,
            num_layers=36,
            num_heads=16,
            num_kv_heads=4,
            head_dim=128,
            context_length=65_536,
            rope_theta=5e6,
            norm_eps=1e-6,
            tie_embeddings=True,
            nope=_periodic(36, _PERIOD),
        )
    },
)
