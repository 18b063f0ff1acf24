"""Dequantise, then multiply: the definition of right."""

import jax
import jax.numpy as jnp
import numpy as np

_CODEBOOK = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


def nf4_matmul(
    x: jax.Array, codes: jax.Array, absmax: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """`x @ (codebook[codes] * absmax)`: x `[..., d_in]`, codes `[d_in / 2, d_out]` uint8, absmax
    float32 `[d_in / block, d_out]`, to `[..., d_out]` of x's dtype. Only x gets a gradient."""
    del implementation
    return _matmul(x, codes, absmax)


def decode(codes: jax.Array, absmax: jax.Array, dtype) -> jax.Array:
    values = jnp.asarray(_CODEBOOK)[jnp.stack([codes >> 4, codes & 15], axis=1)]
    values = values.reshape(absmax.shape[0], -1, absmax.shape[1])
    values = values * jnp.broadcast_to(absmax[:, None], values.shape)
    return values.astype(dtype).reshape(2 * codes.shape[0], -1)


@jax.custom_vjp
def _matmul(x, codes, absmax):
    return jnp.matmul(x, decode(codes, absmax, x.dtype))


def _forward(x, codes, absmax):
    return _matmul(x, codes, absmax), (codes, absmax)


def _backward(saved, dy):
    w = decode(*saved, dy.dtype)
    return jax.lax.dot_general(dy, w, (((dy.ndim - 1,), (1,)), ((), ()))), None, None


_matmul.defvjp(_forward, _backward)
