"""Splash attention, the TPU kernel that comes with JAX, on one chip or over a mesh.

It takes segment ids where others take a mask, skips blocks of scores that are all ahead, and reads
each key head once for its group of query heads. Scores are in vector memory only.

Dimensions: B batch, T positions, N query heads, K key/value heads, H head.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from lora_jax.context_mesh import FSDP, SEQUENCE, TENSOR, size

AXES = (FSDP, TENSOR, SEQUENCE)  # over which rows, heads and query positions are sharded
BLOCKS = (512, 256, 128)


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    *,
    name: str,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention `[B, T, N, H]`, scores scaled by `1 / sqrt(H)`.

    Under automatic partitioning each device of the mesh in context runs the kernel on its rows,
    heads and query positions, and on all key positions of those rows.

    Args:
      q_BTNH, k_BTKH, v_BTKH: bfloat16 or float32.
      segment_ids_BT: int32; attention stays inside.
      name: that of output and log-sum-exp for rematerialisation policies.
      interpret: interprets the kernel, on any platform.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows, heads, positions = (axis if axis in mesh.auto_axes else None for axis in AXES)
    T, N = q_BTNH.shape[1:3]
    kernel = _kernel(T, N, size(TENSOR), size(SEQUENCE), name, interpret)
    segments = None
    if segment_ids_BT is not None:
        segments = splash.SegmentIds(segment_ids_BT, segment_ids_BT)
    arguments = (kernel, q_BTNH, k_BTKH, v_BTKH, segments)
    if not mesh.auto_axes:
        return _on_blocks(*arguments)
    keys = jax.P(rows, None, heads)
    of_segments: Any = (jax.P(rows, positions), jax.P(rows))
    specs = (
        kernel.manual_sharding_spec(jax.NamedSharding(mesh, jax.P(heads, positions))),
        jax.P(rows, positions, heads),
        keys,
        keys,
        None if segments is None else splash.SegmentIds(*of_segments),
    )
    over_mesh = jax.shard_map(
        _on_blocks,
        axis_names=set(mesh.auto_axes),
        in_specs=specs,
        out_specs=jax.P(rows, positions, heads),
        check_vma=False,
    )
    return over_mesh(*arguments)


def fits(B: int, T: int, K: int) -> bool:
    """Whether the mesh in context divides rows, positions and heads into full blocks."""
    rows, heads, positions = map(size, AXES)
    return not (B % rows or K % heads or T % (positions * BLOCKS[-1]))


def _on_blocks(kernel, q_BTNH, k_BTKH, v_BTKH, segments):
    scale = q_BTNH.shape[-1] ** -0.5
    q_BNTH, k_BKTH, v_BKTH = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH * scale, k_BTKH, v_BTKH))
    return jnp.swapaxes(jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, segments), 1, 2)


def _kernel(T: int, N: int, head_shards: int, position_shards: int, name: str, interpret: bool):
    block = next(block for block in BLOCKS if T // position_shards % block == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((T, T))] * N),
        block_sizes=sizes,
        head_shards=head_shards,
        q_seq_shards=position_shards,
        residual_checkpoint_name=name,
        interpret=interpret,
    )
