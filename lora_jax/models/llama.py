"""Llama 2, Llama 3.x, SmolLM2, Mistral, Qwen2 and Qwen3 as pure functions over a params tree.

Dimensions: B batch, T positions, D hidden, F intermediate, V vocabulary, L layers,
N query heads, K key/value heads, H head size.

The tree, with weights applied from the right and layers stacked on the leading axis:

    embed [V, D]
    layers/attn_norm [L, D]
    layers/attn/{q_proj [L, D, N*H], k_proj [L, D, K*H], v_proj [L, D, K*H], o_proj [L, N*H, D]}
    layers/attn/{q_bias [L, N*H], k_bias [L, K*H], v_bias [L, K*H]}     (Qwen2)
    layers/attn/{q_norm [L, H], k_norm [L, H]}                          (Qwen3)
    layers/mlp_norm [L, D]
    layers/mlp/{gate_proj [L, D, F], up_proj [L, D, F], down_proj [L, F, D]}
    norm [D]
    lm_head [D, V]                      (absent where the embedding is tied; `untie` adds it)

`forward` and the others are those of `decoder`, which serves every family.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.models.blocks import gated_mlp, normalized, rotated_heads
from lora_jax.models.cache import Cache as Cache
from lora_jax.models.cache import init_cache as init_cache
from lora_jax.models.config import DecoderConfig
from lora_jax.models.config_fields import FULL, SLIDING, layer_types, read_fields, written_fields
from lora_jax.models.config_json import ModelType, Stated
from lora_jax.models.decoder import extend as extend
from lora_jax.models.decoder import forward as forward
from lora_jax.models.decoder import hidden_states as hidden_states
from lora_jax.models.decoder import init as init
from lora_jax.models.decoder import output_head as output_head
from lora_jax.models.decoder import start_cache as start_cache
from lora_jax.models.family import GGUF, Family, Parameter, Params
from lora_jax.models.mixed_dtypes import along, product
from lora_jax.models.tying import untie as untie


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """The shape of a Llama 2, Llama 3.x, SmolLM2, Mistral, Qwen2 or Qwen3.

    `qkv_bias` adds biases to queries, keys and values (Qwen2), `qk_norm` an RMS norm over each
    head of queries and keys before they are rotated (Qwen3). Beyond `attention_window` positions
    the checkpoint's layers slide a window, which this model does not: longer rows are refused.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    attention_window: int | None = None

    @property
    def family(self) -> Family:
        return FAMILY

    def check_length(self, positions: int) -> None:
        """Raises ValueError if a row of so many positions would need a sliding window."""
        if self.attention_window is not None and positions > self.attention_window:
            raise ValueError(
                f"a row of {positions} positions is longer than the model's attention window of "
                f"{self.attention_window}, beyond which its layers slide that window; that is not "
                "supported. Use shorter rows; where the weights were trained without a window, "
                "remove sliding_window from the checkpoint's config."
            )


def parameters(config: LlamaConfig) -> tuple[Parameter, ...]:
    """The leaves of a model of this shape."""
    d, f, v, h = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    q, k = config.num_heads * h, config.num_kv_heads * h

    def layer(path, shape, name, gguf, initial=1.0):
        names = f"model.layers.{{}}.{name}", f"blk.{{}}.{gguf}"
        return Parameter(f"layers/{path}", shape, *names, initial)

    biases = (
        layer("attn/q_bias", (q,), "self_attn.q_proj.bias", "attn_q.bias", 0.0),
        layer("attn/k_bias", (k,), "self_attn.k_proj.bias", "attn_k.bias", 0.0),
        layer("attn/v_bias", (k,), "self_attn.v_proj.bias", "attn_v.bias", 0.0),
    )
    norms = (
        layer("attn/q_norm", (h,), "self_attn.q_norm.weight", "attn_q_norm.weight"),
        layer("attn/k_norm", (h,), "self_attn.k_norm.weight", "attn_k_norm.weight"),
    )
    head = Parameter("lm_head", (v, d), "lm_head.weight", "output.weight")
    return (
        Parameter("embed", (v, d), "model.embed_tokens.weight", "token_embd.weight"),
        layer("attn_norm", (d,), "input_layernorm.weight", "attn_norm.weight"),
        layer("attn/q_proj", (q, d), "self_attn.q_proj.weight", "attn_q.weight"),
        layer("attn/k_proj", (k, d), "self_attn.k_proj.weight", "attn_k.weight"),
        layer("attn/v_proj", (k, d), "self_attn.v_proj.weight", "attn_v.weight"),
        layer("attn/o_proj", (d, q), "self_attn.o_proj.weight", "attn_output.weight"),
        layer("mlp_norm", (d,), "post_attention_layernorm.weight", "ffn_norm.weight"),
        layer("mlp/gate_proj", (f, d), "mlp.gate_proj.weight", "ffn_gate.weight"),
        layer("mlp/up_proj", (f, d), "mlp.up_proj.weight", "ffn_up.weight"),
        layer("mlp/down_proj", (d, f), "mlp.down_proj.weight", "ffn_down.weight"),
        Parameter("norm", (d,), "model.norm.weight", "output_norm.weight"),
        *(biases if config.qkv_bias else ()),
        *(norms if config.qk_norm else ()),
        *(() if config.tie_embeddings else (head,)),
    )


def project(
    x_BTD: jax.Array, weights: Params, positions_BT: jax.Array, config: LlamaConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]` of one layer, rotated by position."""
    attn = weights["attn"]
    x_BTD = rms_norm(x_BTD, weights["attn_norm"], config)

    def heads(name, count):
        y = product(x_BTD, attn[f"{name}_proj"])
        if config.qkv_bias:
            y = along(jnp.add, y, attn[f"{name}_bias"])
        y = y.reshape(*x_BTD.shape[:2], count, config.head_dim)
        if config.qk_norm and name != "v":
            y = rms_norm(checkpoint_name(y, "projected"), attn[f"{name}_norm"], config)
        return y

    return rotated_heads(heads, positions_BT, config)


def finish(
    x_BTD: jax.Array, attended_BTNH: jax.Array, weights: Params, config: LlamaConfig
) -> jax.Array:
    """The rest of a layer after attention: the output projection, then the gated MLP."""
    attended_BTE = attended_BTNH.reshape(*x_BTD.shape[:2], -1)
    x_BTD = x_BTD + product(attended_BTE, weights["attn"]["o_proj"])
    x_BTD = checkpoint_name(x_BTD, "residual")
    y_BTD = rms_norm(x_BTD, weights["mlp_norm"], config)
    return x_BTD + gated_mlp(y_BTD, weights["mlp"], jax.nn.silu)


def rms_norm(x: jax.Array, scale: jax.Array, config: DecoderConfig) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32, in the dtype of `x`."""
    return along(jnp.multiply, normalized(x, config.norm_eps).astype(x.dtype), scale)


def _of_type(name: str, fields: dict[str, Any], window: int | None) -> LlamaConfig:
    """A sliding window below the context becomes the context: rows within it attend as they would
    without a window, and the model refuses longer ones."""
    context = fields["context_length"]
    return LlamaConfig(
        **fields | {"context_length": min(context, window or context)},
        attention_window=window,
        qkv_bias=name == "qwen2",
        qk_norm=name == "qwen3",
    )


def _type_of(config: LlamaConfig) -> str:
    """ "llama", "qwen2" or "qwen3": what config.json and GGUF call models of this shape.

    Raises:
      ValueError: none has both biases and query/key norms.
    """
    if config.qkv_bias and config.qk_norm:
        raise ValueError("no family has both qkv_bias and qk_norm; no other program would load it.")
    return "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"


def _read(stated: Stated) -> LlamaConfig:
    fields = read_fields(stated)
    return _of_type(stated.get("model_type"), fields, _window(stated, fields["num_layers"]))


def _window(stated: Stated, num_layers: int) -> int | None:
    """The window that some layer slides.

    Qwen has a switch and a first layer for it. Mistral reads neither, nor layer_types; a
    Llama's window shortens the cache that it generates with.
    """
    family = stated.get("model_type")
    is_qwen = family in ("qwen2", "qwen3")
    given = (
        None if is_qwen and not stated.flag("use_sliding_window") else stated.get("sliding_window")
    )
    window = None if given is None else stated.count("sliding_window")
    layers = layer_types(stated, num_layers)
    if layers is None:
        first = num_layers if window is None else 0
        if is_qwen and window is not None:
            first = stated.get("max_window_layers")
            if type(first) is not int:
                raise ValueError(f"{stated.path}: max_window_layers is {first!r}, not a count.")
        layers = [SLIDING if i >= first else FULL for i in range(min(num_layers, 1 << 16))]
    slides = SLIDING in layers
    if slides and window is None:
        raise ValueError(
            f"{stated.path}: layer_types names {SLIDING!r} without a sliding_window in use."
        )
    slides |= family == "mistral" and window is not None
    return window if slides else None


def _from_gguf(
    architecture: str, fields: dict[str, Any], metadata: Mapping[str, Any]
) -> LlamaConfig:
    window = metadata.get("attention.sliding_window")
    if type(window) not in (type(None), int) or (window or 0) < 0:
        raise ValueError(f"attention.sliding_window is {window!r}, expected a count.")
    return _of_type(architecture, fields, window or None)


def _gguf_metadata(config: LlamaConfig) -> dict[str, int]:
    window = config.attention_window
    return {} if window is None else {"attention.sliding_window": window}


def _config_json(config: LlamaConfig) -> dict[str, Any]:
    """What transformers 4 and 5 read; Mistral's is a Llama's, unless it has a window."""
    family = _type_of(config)
    windowed: dict[str, Any] = {}
    if config.attention_window is not None:
        family = "mistral" if family == "llama" else family
        windowed = {"sliding_window": config.attention_window}
        if family != "mistral":
            windowed |= {"use_sliding_window": True, "max_window_layers": 0}
    return {
        "architectures": [_MODEL_TYPES[family].architecture],
        "model_type": family,
        **written_fields(config),
        **windowed,
        "hidden_act": "silu",
        "attention_bias": False,
    }


_QWEN = {
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
# Only Llama and Qwen3 read the switch for biases.
_MODEL_TYPES = {
    "llama": ModelType(
        architecture="LlamaForCausalLM",
        read=_read,
        defaults={"max_position_embeddings": 2048},
        supported={"attention_bias": (False,), "mlp_bias": (False,)},
    ),
    "mistral": ModelType(
        architecture="MistralForCausalLM",
        read=_read,
        defaults={
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
    ),
    "qwen2": ModelType(architecture="Qwen2ForCausalLM", read=_read, defaults=_QWEN),
    "qwen3": ModelType(
        architecture="Qwen3ForCausalLM",
        read=_read,
        defaults=_QWEN | {"head_dim": 128},
        supported={"attention_bias": (False,)},
    ),
}
_SHAPES = {
    "tiny": LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        context_length=1024,
        tie_embeddings=True,
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        context_length=8192,
        rope_theta=100_000.0,
        tie_embeddings=True,
    ),
    "llama-3-8b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        context_length=8192,
        rope_theta=500_000.0,
    ),
    "llama-3-70b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        context_length=8192,
        rope_theta=500_000.0,
    ),
}

FAMILY = Family(
    parameters=parameters,
    project=project,
    finish=finish,
    norm=rms_norm,
    model_types=_MODEL_TYPES,
    config_json=_config_json,
    gguf=GGUF(
        architectures=("llama", "qwen2", "qwen3"),
        architecture_of=_type_of,
        read=_from_gguf,
        metadata=_gguf_metadata,
        interleaved=frozenset({"llama"}),
    ),
    shapes=_SHAPES,
)
