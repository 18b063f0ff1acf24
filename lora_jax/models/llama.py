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

Every weight may be an array or any `Weight`: quantised, adapted, or both. A delta may add `prompt`,
rows read in front of the tokens, and `layers/attn/prefix`, keys and values in front of a layer's.
Leaves may be of several dtypes: activations keep that of `embed`, and logits have the wider of
theirs and the head's.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.context_mesh import FSDP, SEQUENCE, constrain
from lora_jax.kernels.attention import Implementation, attend, masked_attention
from lora_jax.models.cache import Cache as Cache
from lora_jax.models.cache import init_cache as init_cache
from lora_jax.models.cache import require_room
from lora_jax.models.config import LlamaConfig
from lora_jax.models.mixed_dtypes import along, product, read_out
from lora_jax.models.remat import LAYER_INPUT, Remat, checkpointed
from lora_jax.models.rope import rotate
from lora_jax.models.tying import untie as untie
from lora_jax.models.unread_extras import require_read
from lora_jax.paths import one_key
from lora_jax.weights import embed, scan_layers, transpose

Params = dict[str, Any]


def init(config: LlamaConfig, *, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Random params: normal weights of deviation `1 / sqrt(d_in)`, unit norm scales."""
    D, F, L = config.hidden_size, config.intermediate_size, config.num_layers
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    keys = iter(jax.random.split(one_key(key), 9))

    def normal(*shape: int, fan_in: int) -> jax.Array:
        draw = jax.random.normal(next(keys), shape, jnp.float32) / math.sqrt(fan_in)
        return draw.astype(dtype)

    params: Params = {
        "embed": normal(config.vocab_size, D, fan_in=D),
        "layers": {
            "attn_norm": jnp.ones((L, D), dtype),
            "attn": {
                "q_proj": normal(L, D, q_width, fan_in=D),
                "k_proj": normal(L, D, kv_width, fan_in=D),
                "v_proj": normal(L, D, kv_width, fan_in=D),
                "o_proj": normal(L, q_width, D, fan_in=q_width),
            },
            "mlp_norm": jnp.ones((L, D), dtype),
            "mlp": {
                "gate_proj": normal(L, D, F, fan_in=D),
                "up_proj": normal(L, D, F, fan_in=D),
                "down_proj": normal(L, F, D, fan_in=F),
            },
        },
        "norm": jnp.ones((D,), dtype),
    }
    attn = params["layers"]["attn"]
    if config.qkv_bias:
        attn |= {f"{name}_bias": jnp.zeros_like(attn[f"{name}_proj"][:, 0]) for name in "qkv"}
    if config.qk_norm:
        attn |= {f"{name}_norm": jnp.ones((L, config.head_dim), dtype) for name in "qk"}
    if not config.tie_embeddings:
        params["lm_head"] = normal(D, config.vocab_size, fan_in=D)
    return params


def forward(
    params: Params,
    tokens: jax.Array,
    config: LlamaConfig,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    remat: Remat = "none",
) -> jax.Array:
    """Logits `[B, T, V]` of the next token after each of `tokens [B, T]`.

    Args:
      params: the tree above.
      tokens: int32.
      config: the shape of the model.
      positions: `[B, T]`, counted from 0 along each row unless given.
      segment_ids: `[B, T]`, the example that a packed position belongs to; attention stays inside.
      remat: what the backward pass recomputes: "none", "elementwise" (norms, activations and
        attention scores, but no product with a weight), "full" (whole layers, whose inputs stay on
        the device), "offload" (whole layers, whose inputs wait in host memory).
    """
    x = hidden_states(
        params, tokens, config, positions=positions, segment_ids=segment_ids, remat=remat
    )
    return read_out(x, output_head(params))


def hidden_states(
    params: Params,
    tokens: jax.Array,
    config: LlamaConfig,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    remat: Remat = "none",
    attention: Implementation | None = None,
    unroll: int = 1,
) -> jax.Array:
    """What the output head reads, `[B, T, D]`: `forward` short of its product with the vocabulary.

    `attention` names an implementation of `lora_jax.kernels.attention`; None chooses by platform.
    `unroll` layers of the scan are laid out one after another in the program.
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    prefix, prompt = leading(params, config)
    config.check_length(prefix + prompt + tokens.shape[1])
    x_BTD = constrain(embed(tokens, params["embed"]), FSDP, SEQUENCE)
    if prompt:
        rows_BPD = prompt_rows(params, x_BTD)
        first = jnp.broadcast_to(jnp.arange(prompt), rows_BPD.shape[:2])
        positions = jnp.concatenate([first, positions + prompt], axis=1)
        x_BTD = jnp.concatenate([rows_BPD, x_BTD], axis=1)

    def layer(x_BTD, weights):
        x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)
        q, k, v = project(x_BTD, weights, positions + prefix, config)
        if prefix:
            before = [prefix_heads(leaf, k) for leaf in prefix_of(weights)]
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(before, (k, v), strict=True))
        attended = attend(
            q, k, v, segment_ids, prompt=prompt, prefix=prefix, implementation=attention
        )
        x_BTD = finish_layer(x_BTD, attended, weights, config)
        return constrain(x_BTD, FSDP, SEQUENCE), None

    x_BTD, _ = scan_layers(checkpointed(layer, remat), x_BTD, params["layers"], unroll=unroll)
    return rms_norm(x_BTD[:, prompt:], params["norm"], config.norm_eps)


def extend(
    params: Params, tokens: jax.Array, cache: Cache, config: LlamaConfig
) -> tuple[jax.Array, Cache]:
    """Reads `tokens [B, T]` on from a cache.

    Returns:
      What the output head reads, `[B, T, D]`, and the cache with T more positions in every row.
      Under a transformation, positions that exceed the cache give NaN.

    Raises:
      ValueError: if the cache has no room for T more positions.
    """
    require_room(cache, tokens.shape[1])
    return _read(params, embed(tokens, params["embed"]), cache, config)


def _read(params: Params, x_BTD: jax.Array, cache: Cache, config: LlamaConfig):
    B, T = x_BTD.shape[:2]
    config.check_length(cache.k.shape[2])
    positions = cache.lengths[:, None] + jnp.arange(T)[None]
    slots = jnp.arange(cache.k.shape[2])
    mask = (slots[None, None, :] <= positions[:, :, None])[:, None]
    rows = jnp.arange(B)[:, None]

    def layer(x_BTD, scanned):
        weights, k_cache, v_cache = scanned
        q, k, v = project(x_BTD, weights, positions, config)
        k_cache = k_cache.at[rows, positions].set(k.astype(k_cache.dtype))
        v_cache = v_cache.at[rows, positions].set(v.astype(v_cache.dtype))
        keys, values = k_cache.astype(q.dtype), v_cache.astype(q.dtype)
        x_BTD = finish_layer(x_BTD, masked_attention(q, keys, values, mask), weights, config)
        return x_BTD, (k_cache, v_cache)

    x_BTD, (k, v) = scan_layers(layer, x_BTD, (params["layers"], cache.k, cache.v))
    fits_BT1 = (positions < cache.k.shape[2])[..., None]
    x_BTD = rms_norm(jnp.where(fits_BT1, x_BTD, jnp.nan), params["norm"], config.norm_eps)
    return x_BTD, Cache(k, v, cache.lengths + T)


def start_cache(params: Params, config: LlamaConfig, batch: int, length: int) -> Cache:
    """A cache for `length` more positions, in which what a delta puts in front is read already."""
    prefix, prompt = leading(params, config)
    dtype = params["embed"].dtype
    cache = init_cache(config, batch, prefix + prompt + length, dtype)
    if prefix:
        k, v = (
            jax.vmap(prefix_heads)(leaf, cache.k[:, :, :0]) for leaf in prefix_of(params["layers"])
        )
        k, v = cache.k.at[:, :, :prefix].set(k), cache.v.at[:, :, :prefix].set(v)
        cache = Cache(k, v, cache.lengths + prefix)
    if prompt:
        like = jnp.zeros((batch, 0, config.hidden_size), dtype)
        _, cache = _read(params, prompt_rows(params, like), cache, config)
    return cache


def leading(params: Params, config: LlamaConfig) -> tuple[int, int]:
    """How many keys of a prefix, and how many rows of a prompt, stand in front of the tokens.

    Raises:
      ValueError: if they leave no place in the model's context, or a prefix is of another width
        than the keys; for a parameter of a delta that stands where nothing reads it.
    """
    require_read(params, config)
    prefix = params["layers"]["attn"].get("prefix")
    prompt = params.get("prompt")
    lengths = (
        0 if prefix is None else prefix.k.shape[-2],
        0 if prompt is None else prompt.rows.shape[-2],
    )
    if sum(lengths) >= config.context_length:
        raise ValueError(
            f"a prefix of {lengths[0]} and a prompt of {lengths[1]} leave no token in the model's "
            f"context of {config.context_length}: make them shorter."
        )
    return lengths


def prompt_rows(params: Params, x_BTD: jax.Array) -> jax.Array:
    """The prompt `[B, P, D]`, in the type of the embedded tokens."""
    rows = params["prompt"].rows.astype(x_BTD.dtype)
    return jnp.broadcast_to(rows, (x_BTD.shape[0], *rows.shape[-2:]))


def prefix_of(weights: Params) -> tuple[jax.Array, jax.Array]:
    return weights["attn"]["prefix"].k, weights["attn"]["prefix"].v


def prefix_heads(leaf: jax.Array, k_BSKH: jax.Array) -> jax.Array:
    """Keys or values of a prefix, `[P, K*H]` or `[B, P, K*H]`, as `[B, P, K, H]`."""
    B, _, K, H = k_BSKH.shape
    heads = leaf.reshape(*leaf.shape[:-1], K, H).astype(k_BSKH.dtype)
    return jnp.broadcast_to(heads, (B, *heads.shape[-3:]))


def output_head(params: Params) -> Any:
    """The weight `[D, V]` of the output head: its own, or the embedding's transpose."""
    return params["lm_head"] if "lm_head" in params else transpose(params["embed"])


def project(
    x_BTD: jax.Array, weights: Params, positions_BT: jax.Array, config: LlamaConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]` of one layer, positions turned in."""
    attn = weights["attn"]
    x_BTD = rms_norm(x_BTD, weights["attn_norm"], config.norm_eps)

    def heads(name, count):
        y = product(x_BTD, attn[f"{name}_proj"])
        if config.qkv_bias:
            y = along(jnp.add, y, attn[f"{name}_bias"])
        y = y.reshape(*x_BTD.shape[:2], count, config.head_dim)
        if config.qk_norm and name != "v":
            y = rms_norm(checkpoint_name(y, "projected"), attn[f"{name}_norm"], config.norm_eps)
        return y

    q_BTNH = rotate(heads("q", config.num_heads), positions_BT, config)
    k_BTKH = rotate(heads("k", config.num_kv_heads), positions_BT, config)
    v_BTKH = heads("v", config.num_kv_heads)
    return (
        checkpoint_name(q_BTNH, "query"),
        checkpoint_name(k_BTKH, "key"),
        checkpoint_name(v_BTKH, "value"),
    )


def finish_layer(
    x_BTD: jax.Array, attended_BTNH: jax.Array, weights: Params, config: LlamaConfig
) -> jax.Array:
    """The rest of a layer after attention: the output projection, then the gated MLP."""
    attended_BTE = attended_BTNH.reshape(*x_BTD.shape[:2], -1)
    x_BTD = x_BTD + product(attended_BTE, weights["attn"]["o_proj"])
    x_BTD = checkpoint_name(x_BTD, "residual")
    mlp = weights["mlp"]
    y_BTD = rms_norm(x_BTD, weights["mlp_norm"], config.norm_eps)
    gate_BTF = checkpoint_name(product(y_BTD, mlp["gate_proj"]), "gate")
    up_BTF = checkpoint_name(product(y_BTD, mlp["up_proj"]), "up")
    return x_BTD + product(jax.nn.silu(gate_BTF) * up_BTF, mlp["down_proj"])


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32, in the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)
    return along(jnp.multiply, normed.astype(x.dtype), scale)
