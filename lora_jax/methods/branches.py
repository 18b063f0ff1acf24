"""What the branches of several methods are made of: dropout, and the way out of a narrow axis."""

import jax
import jax.numpy as jnp

from lora_jax.weights import vary


def widen(inner: jax.Array, b: jax.Array) -> jax.Array:
    """`inner @ b` for a narrow `inner [..., r]`, with a gradient of `b` that keeps `dy` as it lies.

    JAX's own rule puts the cotangent `dy [..., d_out]` first in the product that makes `db`, and
    XLA's CPU backend then copies it into its transpose: an eighth of a whole training step.
    """
    return _widen(vary(inner, like=b), vary(b, like=inner))


@jax.custom_vjp
def _widen(inner, b):
    return jnp.matmul(inner, b)


def _widen_forward(inner, b):
    return jnp.matmul(inner, b), (inner, b)


def _widen_backward(saved, dy):
    inner, b = saved
    rows = tuple(range(inner.ndim - 1))
    db = jax.lax.dot_general(inner, dy, ((rows, rows), ((), ())))
    return jax.lax.dot_general(dy, b, (((dy.ndim - 1,), (1,)), ((), ()))), db


_widen.defvjp(_widen_forward, _widen_backward)


def drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """`x` with entries zeroed at `rate` and the rest divided by `1 - rate`."""
    if rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))
