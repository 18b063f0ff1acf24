"""Leaves that the trees of several families share, with the names of transformers and llama.cpp.

Dimensions: D hidden, F intermediate, V vocabulary, N query heads, K key/value heads, H head size.
"""

from lora_jax.models.config import DecoderConfig
from lora_jax.models.family import Parameter


def layer_leaf(
    path: str,
    shape: tuple[int, ...],
    huggingface: str,
    gguf: str,
    *,
    initial: float = 1.0,
    gguf_added: float = 0.0,
) -> Parameter:
    """A leaf of each layer, by its path and its names within one."""
    return Parameter(
        f"layers/{path}",
        shape,
        f"model.layers.{{}}.{huggingface}",
        f"blk.{{}}.{gguf}",
        initial=initial,
        gguf_added=gguf_added,
    )


def matrix(path: str, d_out: int, d_in: int, huggingface: str, gguf: str) -> Parameter:
    """A matrix of each layer."""
    return layer_leaf(path, (d_out, d_in), f"{huggingface}.weight", f"{gguf}.weight")


def bias(path: str, size: int, huggingface: str, gguf: str) -> Parameter:
    """A bias of each layer."""
    return layer_leaf(path, (size,), f"{huggingface}.bias", f"{gguf}.bias", initial=0.0)


def norm(
    path: str, size: int, huggingface: str, gguf: str, *, from_zero: bool = False
) -> Parameter:
    """The scale of a norm of each layer; `from_zero` where the norm adds 1 to it, which llama.cpp
    has added already."""
    return layer_leaf(
        path,
        (size,),
        f"{huggingface}.weight",
        f"{gguf}.weight",
        initial=0.0 if from_zero else 1.0,
        gguf_added=1.0 if from_zero else 0.0,
    )


def embedding(config: DecoderConfig) -> Parameter:
    shape = config.vocab_size, config.hidden_size
    return Parameter("embed", shape, "model.embed_tokens.weight", "token_embd.weight")


def last_norm(config: DecoderConfig, *, from_zero: bool = False) -> Parameter:
    """That of the last layer's result."""
    return Parameter(
        "norm",
        (config.hidden_size,),
        "model.norm.weight",
        "output_norm.weight",
        initial=0.0 if from_zero else 1.0,
        gguf_added=1.0 if from_zero else 0.0,
    )


def head(config: DecoderConfig) -> tuple[Parameter, ...]:
    """The output head, where it is not the embedding."""
    shape = config.vocab_size, config.hidden_size
    own = Parameter("lm_head", shape, "lm_head.weight", "output.weight")
    return () if config.tie_embeddings else (own,)


def attention(config: DecoderConfig) -> tuple[Parameter, ...]:
    """The four projections of attention."""
    d, q, k = config.hidden_size, *_widths(config)
    return (
        matrix("attn/q_proj", q, d, "self_attn.q_proj", "attn_q"),
        matrix("attn/k_proj", k, d, "self_attn.k_proj", "attn_k"),
        matrix("attn/v_proj", k, d, "self_attn.v_proj", "attn_v"),
        matrix("attn/o_proj", d, q, "self_attn.o_proj", "attn_output"),
    )


def qkv_biases(config: DecoderConfig) -> tuple[Parameter, ...]:
    q, k = _widths(config)
    return (
        bias("attn/q_bias", q, "self_attn.q_proj", "attn_q"),
        bias("attn/k_bias", k, "self_attn.k_proj", "attn_k"),
        bias("attn/v_bias", k, "self_attn.v_proj", "attn_v"),
    )


def output_bias(config: DecoderConfig) -> tuple[Parameter, ...]:
    return (bias("attn/o_bias", config.hidden_size, "self_attn.o_proj", "attn_output"),)


def head_norms(config: DecoderConfig, *, from_zero: bool = False) -> tuple[Parameter, ...]:
    """Norms of each head of queries and keys."""
    return tuple(
        norm(
            f"attn/{name}_norm",
            config.head_dim,
            f"self_attn.{name}_norm",
            f"attn_{name}_norm",
            from_zero=from_zero,
        )
        for name in ("q", "k")
    )


def gated_mlp(config: DecoderConfig) -> tuple[Parameter, ...]:
    d, f = config.hidden_size, config.intermediate_size
    return (
        matrix("mlp/gate_proj", f, d, "mlp.gate_proj", "ffn_gate"),
        matrix("mlp/up_proj", f, d, "mlp.up_proj", "ffn_up"),
        matrix("mlp/down_proj", d, f, "mlp.down_proj", "ffn_down"),
    )


def mlp_biases(config: DecoderConfig) -> tuple[Parameter, ...]:
    d, f = config.hidden_size, config.intermediate_size
    return (
        bias("mlp/gate_bias", f, "mlp.gate_proj", "ffn_gate"),
        bias("mlp/up_bias", f, "mlp.up_proj", "ffn_up"),
        bias("mlp/down_bias", d, "mlp.down_proj", "ffn_down"),
    )


def _widths(config: DecoderConfig) -> tuple[int, int]:
    return config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim


def llama_layer(config: DecoderConfig) -> tuple[Parameter, ...]:
    """The norms and matrices of a Llama's layer."""
    d = config.hidden_size
    return (
        norm("attn_norm", d, "input_layernorm", "attn_norm"),
        *attention(config),
        norm("mlp_norm", d, "post_attention_layernorm", "ffn_norm"),
        *gated_mlp(config),
    )


def gemma_layer(config: DecoderConfig) -> tuple[Parameter, ...]:
    """The norms and matrices of a Gemma's layer, whose norms are from zero."""
    d = config.hidden_size

    def own(path, huggingface, gguf):
        return norm(path, d, huggingface, gguf, from_zero=True)

    return (
        own("attn_norm", "input_layernorm", "attn_norm"),
        *attention(config),
        own("attn_post_norm", "post_attention_layernorm", "post_attention_norm"),
        own("mlp_norm", "pre_feedforward_layernorm", "ffn_norm"),
        *gated_mlp(config),
        own("mlp_post_norm", "post_feedforward_layernorm", "post_ffw_norm"),
    )
