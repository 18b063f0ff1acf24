"""Llama 2, Llama 3.x, SmolLM2, Mistral, Ministral, Qwen2 and Qwen3 as pure functions over a tree.

Dimensions: B batch, T positions, D hidden, F intermediate, V vocabulary, L layers,
N query heads, K key/value heads, H head size.

The tree, with weights applied from the right and layers stacked on the leading axis:

    embed [V, D]
    layers/attn_norm [L, D]
    layers/attn/{q_proj [L, D, N*H], k_proj [L, D, K*H], v_proj [L, D, K*H], o_proj [L, N*H, D]}
    layers/attn/{q_bias [L, N*H], k_bias [L, K*H], v_bias [L, K*H]}     (Qwen2, attention_bias)
    layers/attn/o_bias [L, D]                                           (attention_bias)
    layers/attn/{q_norm [L, H], k_norm [L, H]}                          (Qwen3)
    layers/mlp_norm [L, D]
    layers/mlp/{gate_proj [L, D, F], up_proj [L, D, F], down_proj [L, F, D]}
    layers/mlp/{gate_bias [L, F], up_bias [L, F], down_bias [L, D]}     (mlp_bias)
    norm [D]
    lm_head [D, V]                      (absent where the embedding is tied; `untie` adds it)

`forward` and the others are those of `decoder`, which serves every family.
"""

import dataclasses

import jax

from lora_jax.models import leaves, llama_formats
from lora_jax.models.blocks import Heads, attention_heads
from lora_jax.models.blocks import finish as finish
from lora_jax.models.blocks import rms_norm as rms_norm
from lora_jax.models.cache import Cache as Cache
from lora_jax.models.cache import init_cache as init_cache
from lora_jax.models.config import Attention, DecoderConfig
from lora_jax.models.config_fields import Windows
from lora_jax.models.config_json import ModelType, Stated
from lora_jax.models.decoder import extend as extend
from lora_jax.models.decoder import forward as forward
from lora_jax.models.decoder import hidden_states as hidden_states
from lora_jax.models.decoder import init as init
from lora_jax.models.decoder import output_head as output_head
from lora_jax.models.decoder import start_cache as start_cache
from lora_jax.models.family import GGUF, Family, Parameter, Params
from lora_jax.models.tying import untie as untie


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """The shape of a Llama 2, Llama 3.x, SmolLM2, Mistral, Ministral, Qwen2 or Qwen3.

    `qkv_bias` adds biases to queries, keys and values (Qwen2), `o_bias` one to the output of
    attention, `mlp_bias` three to the MLP; `qk_norm` adds an RMS norm over each head of queries and
    keys before they are rotated (Qwen3). `windows` is for each layer the number of keys that a
    query sees; None, here or for a layer, is all.
    """

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: Windows | None = None

    @property
    def family(self) -> Family:
        return FAMILY

    @property
    def attention(self) -> Attention:
        return Attention(windows=self.windows)


def parameters(config: LlamaConfig) -> tuple[Parameter, ...]:
    """The leaves of a model of this shape."""
    return (
        leaves.embedding(config),
        *leaves.llama_layer(config),
        leaves.last_norm(config),
        *(leaves.qkv_biases(config) if config.qkv_bias else ()),
        *(leaves.output_bias(config) if config.o_bias else ()),
        *(leaves.mlp_biases(config) if config.mlp_bias else ()),
        *(leaves.head_norms(config) if config.qk_norm else ()),
        *leaves.head(config),
    )


def project(x_BTD: jax.Array, weights: Params, config: LlamaConfig) -> Heads:
    """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]` of one layer."""
    x_BTD = rms_norm(x_BTD, weights["attn_norm"], config)
    norm = rms_norm if config.qk_norm else None
    return attention_heads(x_BTD, weights["attn"], config, norm)


def _read(stated: Stated) -> LlamaConfig:
    return LlamaConfig(**llama_formats.fields_of(stated))


_MISTRAL = {
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
_QWEN = {
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
# Only Llama and Qwen3 read the switch for biases, and only a Llama that of the MLP's.
_MODEL_TYPES = {
    "llama": ModelType(
        architecture="LlamaForCausalLM",
        read=_read,
        defaults={"max_position_embeddings": 2048},
    ),
    "mistral": ModelType(architecture="MistralForCausalLM", read=_read, defaults=_MISTRAL),
    "ministral": ModelType(architecture="MinistralForCausalLM", read=_read, defaults=_MISTRAL),
    "qwen2": ModelType(architecture="Qwen2ForCausalLM", read=_read, defaults=_QWEN),
    "qwen3": ModelType(
        architecture="Qwen3ForCausalLM", read=_read, defaults=_QWEN | {"head_dim": 128}
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
    config_json=llama_formats.config_json,
    gguf=GGUF(
        architectures=("llama", "qwen2", "qwen3"),
        architecture_of=llama_formats.architecture_of,
        read=lambda *given: LlamaConfig(**llama_formats.fields_of_gguf(*given)),
        metadata=llama_formats.gguf_metadata,
        reads=frozenset({"attention.sliding_window"}),
        interleaved=frozenset({"llama"}),
    ),
    shapes=_SHAPES,
)
