"""Causal grouped-query attention within segments, by the platform's best kernel.

`reference.py` is the definition; the kernels are JAX's own: splash attention on a TPU, cuDNN's on
a GPU.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax import context_mesh
from lora_jax.kernels.attention import cudnn, splash
from lora_jax.kernels.attention.reference import cached_attention as cached_attention
from lora_jax.kernels.attention.reference import causal_mask as causal_mask
from lora_jax.kernels.attention.reference import masked_attention as masked_attention

Implementation = Literal["xla", "splash", "cudnn"]
PLATFORM: dict[Implementation, str] = {"splash": "tpu", "cudnn": "cuda"}
# The name, for rematerialisation policies, of attention's output, which its backward pass reads.
ATTENDED = "attended"


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    *,
    prompt: int = 0,
    prefix: int = 0,
    scale: float | None = None,
    cap: float | None = None,
    window: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """`softmax(q k^T / sqrt(H)) v` over the keys that each query may see, `[B, T, N, H]`.

    A query sees no key ahead of its own and none of another segment. Query heads `i N / K` to
    `(i + 1) N / K - 1` share key head `i`.

    Args:
      q_BTNH: queries, those of a `prompt` first.
      k_BSKH, v_BSKH: keys and values, S = prefix + T.
      segment_ids_BT: int32 `[B, T - prompt]`, the example that a packed position belongs to.
      prompt: how many leading queries, with their keys, belong to every segment.
      prefix: how many leading keys, with no query of their own, every segment sees.
      scale: of the scores, in place of `1 / sqrt(H)`.
      cap: scores s become `cap * tanh(s / cap)`.
      window: int32 scalar, how many keys a query sees at most, its own included.
      implementation: None takes the kernel of the platform where it takes the arguments, and XLA
        elsewhere: on a CPU, for a length that is no multiple of 128 (TPU), for float32 (GPU),
        after a prompt or a prefix, with a scale, a cap or a window. A name takes that one or
        raises. The device is that of `jax.sharding.use_abstract_mesh`, for a program compiled ahead
        of time, or the default one.
        "xla" stores a score for every head and pair of positions. "splash" (TPU) stores none; with
        several devices it needs their mesh in context (`jax.set_mesh`), and is sharded over its
        axes `fsdp` (rows), `tensor` (heads) and `sequence` (query positions). "cudnn" (GPU, 16-bit
        types) stores none either, but takes segments as a bias of 2 bytes for every row and pair
        of positions, which all heads share.

    Raises:
      ValueError: for an implementation given by name that the platform or the arguments do not
        allow.
    """
    given = (q_BTNH, k_BSKH, prompt, prefix)
    options = {"scale": scale, "cap": cap, "window": window}
    if implementation is not None and (lack := _lack(implementation, *given, **options)):
        raise ValueError(
            f"attention: {implementation!r} {lack}. Leave `implementation` out, or ask for 'xla'."
        )
    runs: dict[str, Callable[..., jax.Array]] = {
        "xla": partial(_xla, prompt=prompt, prefix=prefix, **options),
        "splash": partial(splash.attend, name=ATTENDED),
        "cudnn": _cudnn,
    }
    arguments = (q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)
    if implementation is not None:
        return runs[implementation](*arguments)
    kernels = {
        platform: runs[name]
        for name, platform in PLATFORM.items()
        if _partitioned(name) and not _lack(name, *given, **options)
    }
    if not kernels:
        return runs["xla"](*arguments)
    # The same trace may still be lowered for another platform, a host's CPU for one. There only
    # the arguments are kept for the backward pass, so that the kernel need not keep more.
    return jax.lax.platform_dependent(*arguments, default=jax.checkpoint(runs["xla"]), **kernels)


def _xla(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, *, prompt, prefix, scale, cap, window):
    length = q_BTNH.shape[1] - prompt
    mask = causal_mask(length, segment_ids_BT, prompt=prompt, prefix=prefix, window=window)
    attended = masked_attention(q_BTNH, k_BSKH, v_BSKH, mask, scale=scale, cap=cap)
    return checkpoint_name(attended, ATTENDED)


def _cudnn(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    return checkpoint_name(cudnn.attend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT), ATTENDED)


def _lack(implementation, q, k, prompt, prefix, **options) -> str | None:
    """What keeps an implementation from taking these arguments here; None where nothing does."""
    if implementation not in get_args(Implementation):
        return f"is not one of {', '.join(get_args(Implementation))}"
    if implementation == "xla":
        return None
    device = context_mesh.device()
    needed = {"splash": "tpu", "cudnn": "gpu"}[implementation]
    if device.platform != needed:
        return f"needs a {needed.upper()}, and this program is for a {device.device_kind}"
    if prompt or prefix:
        return f"takes neither a prompt nor a prefix, and there are {prompt} and {prefix} positions"
    if given := [name for name, value in options.items() if value is not None]:
        return f"takes no {' and no '.join(given)}"
    (B, T, _, H), K = q.shape, k.shape[2]
    if implementation == "cudnn":
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            return f"takes bfloat16 and float16, and the queries are {q.dtype}"
        if H % 8 or H > 128 or T % 2:
            return f"takes heads of a multiple of 8 up to 128 and an even length, not {H} and {T}"
        return None
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes bfloat16 and float32, and the queries are {q.dtype}"
    if not splash.fits(B, T, K):
        return f"has no blocks for {B} rows of {T} positions and {K} key heads on this mesh"
    return None


def _partitioned(implementation: Implementation) -> bool:
    """Whether a kernel gets its blocks of sharded arrays: XLA partitions cuDNN's, and Pallas' are
    partitioned where a mesh is in context."""
    mesh = jax.sharding.get_abstract_mesh()
    return implementation == "cudnn" or not mesh.empty or jax.device_count() == 1
