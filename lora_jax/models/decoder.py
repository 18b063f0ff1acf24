"""A decoder of any family: its layers in a scan, over full rows or over a cache.

Dimensions: B batch, T positions, D hidden, V vocabulary, L layers, N query heads, K key/value
heads, H head size.

Every weight may be an array or any `Weight`: quantised, adapted, or both. A delta may add `prompt`,
rows read in front of the tokens, and `layers/attn/prefix`, keys and values in front of a layer's.
Leaves may be of several dtypes: activations keep that of `embed`, and logits have the wider of
theirs and the head's.
"""

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax import paths
from lora_jax.context_mesh import FSDP, SEQUENCE, constrain
from lora_jax.kernels.attention import Implementation, attend
from lora_jax.models.cache import Cache, LayeredCache, init_cache, require_room
from lora_jax.models.config import DecoderConfig
from lora_jax.models.family import Params
from lora_jax.models.leading import leading, prefix_heads, prefix_of, prompt_rows
from lora_jax.models.remat import LAYER_INPUT, Remat, checkpointed
from lora_jax.models.rope import LayerRopes, example_lengths, layer_ropes
from lora_jax.weights import scan_layers, transpose

AnyCache = TypeVar("AnyCache", bound=LayeredCache)


def init(config: DecoderConfig, *, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Random params: normal matrices of deviation `1 / sqrt(d_in)`, and the family's initial
    vectors."""
    table = config.family.parameters(config)
    matrices = [leaf.path for leaf in table if len(leaf.shape) == 2]
    keys = dict(zip(matrices, jax.random.split(paths.one_key(key), len(matrices)), strict=True))

    def leaf_of(parameter):
        shape = parameter.shape_in_tree(config.num_layers)
        if parameter.path not in keys:
            return jnp.full(shape, parameter.initial, dtype)
        values = jax.random.normal(keys[parameter.path], shape, jnp.float32)
        return (values / math.sqrt(parameter.shape[1])).astype(dtype)

    return paths.nest({parameter.path: leaf_of(parameter) for parameter in table})


def forward(
    params: Params,
    tokens: jax.Array,
    config: DecoderConfig,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    remat: Remat = "none",
) -> jax.Array:
    """Logits `[B, T, V]` of the next token after each of `tokens [B, T]`.

    Args:
      params: the family's tree.
      tokens: int32.
      config: the shape of the model.
      positions: `[B, T]`, counted from 0 along each row unless given.
      segment_ids: `[B, T]`, the example that a packed position belongs to; attention stays inside.
      remat: what the backward pass recomputes: "none", "elementwise" (norms, activations and
        attention scores, but no product with a weight), "full" (complete layers, whose inputs stay
        on the device), "offload" (complete layers, whose inputs are kept in host memory).
    """
    x_BTD = hidden_states(
        params, tokens, config, positions=positions, segment_ids=segment_ids, remat=remat
    )
    return config.family.read_out(x_BTD, output_head(params), config)


def hidden_states(
    params: Params,
    tokens: jax.Array,
    config: DecoderConfig,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    remat: Remat = "none",
    attention: Implementation | None = None,
    unroll: int = 1,
) -> jax.Array:
    """The input of the output head, `[B, T, D]`: `forward` without its product with the vocabulary.

    `attention` names an implementation of `lora_jax.kernels.attention`; None chooses by platform.
    `unroll` layers of the scan are unrolled in the program.
    """
    family, how = config.family, config.attention
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    prefix, prompt = leading(params, config)
    x_BTD = constrain(family.embed(tokens, params["embed"], config), FSDP, SEQUENCE)
    if prompt:
        rows_BPD = prompt_rows(params, x_BTD)
        first = jnp.broadcast_to(jnp.arange(prompt), rows_BPD.shape[:2])
        positions = jnp.concatenate([first, positions + prompt], axis=1)
        x_BTD = jnp.concatenate([rows_BPD, x_BTD], axis=1)

    ropes = layer_ropes(config, example_lengths(config, positions, segment_ids, prompt))

    def layer(x_BTD, scanned):
        weights, window, which = scanned
        x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)
        q, k, v = _heads(config, ropes, x_BTD, weights, positions + prefix, which)
        if prefix:
            before = [prefix_heads(leaf, k) for leaf in prefix_of(weights)]
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(before, (k, v), strict=True))
        attended = attend(
            q,
            k,
            v,
            segment_ids,
            prompt=prompt,
            prefix=prefix,
            scale=how.scale,
            cap=how.cap,
            window=window,
            implementation=attention,
        )
        x_BTD = family.finish(x_BTD, attended, weights, config)
        return constrain(x_BTD, FSDP, SEQUENCE), None

    layers = params["layers"], _windows(config, x_BTD.shape[1] + prefix), ropes.which
    x_BTD, _ = scan_layers(checkpointed(layer, remat), x_BTD, layers, unroll=unroll)
    return family.norm(x_BTD[:, prompt:], params["norm"], config)


def extend(
    params: Params, tokens: jax.Array, cache: Cache, config: DecoderConfig
) -> tuple[jax.Array, Cache]:
    """Reads `tokens [B, T]` on from a cache.

    Returns:
      The input of the output head, `[B, T, D]`, and the cache with T more positions in every row.
      Under a transformation, positions that exceed the cache give NaN.

    Raises:
      ValueError: if the cache has no room for T more positions.
    """
    require_room(cache, tokens.shape[1])
    return read_on(params, tokens, cache, config)


def read_on(
    params: Params, tokens: jax.Array, cache: AnyCache, config: DecoderConfig
) -> tuple[jax.Array, AnyCache]:
    """`extend` for a cache of any type, whose room is not checked."""
    x_BTD = config.family.embed(tokens, params["embed"], config)
    return _read(params, x_BTD, cache, config)


def _read(
    params: Params, x_BTD: jax.Array, cache: AnyCache, config: DecoderConfig
) -> tuple[jax.Array, AnyCache]:
    family, how, size = config.family, config.attention, cache.size
    T = x_BTD.shape[1]
    positions = cache.lengths[:, None] + jnp.arange(T)[None]

    # One length for all that a cache will hold, lest its keys be of several frequencies.
    ropes = layer_ropes(config, size)

    def layer(carry, scanned):
        (x_BTD, cache), (weights, window, which, index) = carry, scanned
        q, k, v = _heads(config, ropes, x_BTD, weights, positions, which)
        cache = cache.write(index, k, v)
        attended = cache.attend(index, q, how, window)
        return (family.finish(x_BTD, attended, weights, config), cache), None

    indices = jnp.arange(config.num_layers)
    layers = params["layers"], _windows(config, size), ropes.which, indices
    (x_BTD, cache), _ = scan_layers(layer, (x_BTD, cache), layers)
    fits_BT1 = (positions < size)[..., None]
    x_BTD = family.norm(jnp.where(fits_BT1, x_BTD, jnp.nan), params["norm"], config)
    return x_BTD, cache.read(T)


def _heads(
    config: DecoderConfig,
    ropes: LayerRopes,
    x_BTD: jax.Array,
    weights: Params,
    positions_BT: jax.Array,
    which: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]` of one layer, rotated by position."""
    q_BTNH, k_BTKH, v_BTKH = config.family.project(x_BTD, weights, config)
    q_BTNH = ropes.rotate(q_BTNH, positions_BT, which)
    k_BTKH = ropes.rotate(k_BTKH, positions_BT, which)
    return (
        checkpoint_name(q_BTNH, "query"),
        checkpoint_name(k_BTKH, "key"),
        checkpoint_name(v_BTKH, "value"),
    )


def _windows(config: DecoderConfig, length: int) -> jax.Array | None:
    """How many of `length` keys a query of each layer sees, `[L]`; None where all see all."""
    windows = config.attention.windows
    if windows is None or all(window is None or window >= length for window in windows):
        return None
    return jnp.array([length if window is None else window for window in windows], jnp.int32)


def start_cache(params: Params, config: DecoderConfig, batch: int, length: int) -> Cache:
    """A cache for `length` more positions that has already read a delta's prefix and prompt."""
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


def output_head(params: Params) -> Any:
    """The weight `[D, V]` of the output head: its own, or the embedding's transpose."""
    return params["lm_head"] if "lm_head" in params else transpose(params["embed"])
