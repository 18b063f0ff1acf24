"""cuDNN's attention, through `jax.nn.dot_product_attention`, on a GPU.

Segments are passed as a mask, which JAX turns into a bias of 2 bytes for each row and pair of
positions, shared by all heads. JAX has no other public way to pass packed rows there.

Dimensions: B batch, T positions, N query heads, K key/value heads, H head.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


@jax.custom_vjp
def attend(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None
) -> jax.Array:
    """Causal attention `[B, T, N, H]`, scores scaled by `1 / sqrt(H)`, of 16-bit arrays.

    Nothing but the arguments is kept for the backward pass, which runs the forward kernel again.
    """
    return over_rows(_attend)(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def _forward(*arguments):
    return attend(*arguments), arguments


def _backward(arguments, dy_BTNH):
    return *over_rows(_gradients)(*arguments, dy_BTNH), None


attend.defvjp(_forward, _backward)


def _attend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    mask = None
    if segment_ids_BT is not None:
        mask = segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=mask, is_causal=True, implementation="cudnn"
    )


def _gradients(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, dy_BTNH):
    _, vjp = jax.vjp(lambda *a: _attend(*a, segment_ids_BT), q_BTNH, k_BTKH, v_BTKH)
    return vjp(dy_BTNH)


def over_rows(f: Callable) -> Callable:
    """`f` of arrays `[B, ...]`, with those of a vmap as more rows: JAX's own rule for the kernel
    needs a bias for each head there."""
    rows = jax.custom_batching.custom_vmap(f)

    @rows.def_vmap
    def batched(size, batched, *arguments):
        def fold(x, varies):
            every = x if varies else jnp.broadcast_to(x, (size, *x.shape))
            return every.reshape(-1, *every.shape[2:])

        results = rows(*jax.tree.map(fold, arguments, tuple(batched)))
        unfolded = jax.tree.map(lambda y: y.reshape(size, -1, *y.shape[1:]), results)
        return unfolded, jax.tree.map(lambda y: True, unfolded)

    return rows
