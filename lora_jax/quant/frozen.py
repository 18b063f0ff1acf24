"""Products with a frozen weight, which keep nothing but its stored bytes for the backward pass."""

from typing import Protocol

import jax


class Frozen(Protocol):
    """A pytree that multiplies by a matrix and by its transpose."""

    def matmul(self, x: jax.Array) -> jax.Array: ...

    def matmul_transposed(self, x: jax.Array) -> jax.Array: ...


@jax.custom_vjp
def matmul(x: jax.Array, weight: Frozen) -> jax.Array:
    """`x @ W`; its gradient flows to `x` alone, and decodes the weight again."""
    return weight.matmul(x)


@jax.custom_vjp
def matmul_transposed(x: jax.Array, weight: Frozen) -> jax.Array:
    """`x @ W.T`, likewise."""
    return weight.matmul_transposed(x)


matmul.defvjp(
    lambda x, weight: (matmul(x, weight), weight),
    lambda weight, dy: (matmul_transposed(dy, weight), None),
)
matmul_transposed.defvjp(
    lambda x, weight: (matmul_transposed(x, weight), weight),
    lambda weight, dy: (matmul(dy, weight), None),
)
