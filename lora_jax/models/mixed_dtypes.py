"""One rule for a tree of several dtypes: activations keep the dtype of the embedding.

Where they meet a leaf of another dtype, both are cast to the wider of the two, and the result is
cast back; so a float32 norm, bias or matrix counts in full, and a layer keeps its input's dtype.
The output head returns its logits in the wider dtype. Nothing is cast where all leaves have one
dtype, and a quantised weight is decoded to the dtype of its input.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.weights import Weight, cast, linear


def wider(x: Any, w: Any) -> Any:
    """The dtype that holds the values of both, even where implicit promotion is an error."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(x.dtype, w.dtype)


def product(x: jax.Array, w: jax.Array | Weight) -> jax.Array:
    """`x @ w`, in the dtype of `x`."""
    return read_out(x, w).astype(x.dtype)


def read_out(x: jax.Array, head: jax.Array | Weight) -> jax.Array:
    """`x @ head`, in the wider dtype of the two."""
    dtype = wider(x, head)
    return linear(x.astype(dtype), cast(head, dtype))


def along(operation: Callable, x: jax.Array, vector: jax.Array) -> jax.Array:
    """`operation(x, vector)` along the last axis, in the dtype of `x`."""
    dtype = wider(x, vector)
    both = x.astype(dtype), jnp.broadcast_to(vector.astype(dtype), x.shape)
    return operation(*both).astype(x.dtype)
