"""Short names for a tree: by its bits, and by its shapes."""

import hashlib

import jax
import jax.numpy as jnp

from lora_jax import paths
from lora_jax.weights import PyTree


def fingerprint(base: PyTree) -> str:
    """A name for a tree by its paths, shapes, dtypes and bits.

    Each leaf's bits are summed as integers, weighted by their position, on the devices that hold
    the leaf, so that one number is all that the host reads.
    """
    digest = hashlib.sha256()
    for path, leaf in _arrays(base).items():
        digest.update(f"{path} {leaf.shape} {leaf.dtype} {int(_checksum(leaf))}\n".encode())
    return digest.hexdigest()[:16]


def _arrays(base: PyTree) -> dict[str, jax.Array]:
    """A tree may also hold functions and settings, which have no bits."""
    return {p: leaf for p, leaf in paths.flatten(base).items() if paths.is_array(leaf)}


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    width = leaf.dtype.itemsize * 8
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{width}").astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)  # in the flattened leaf, which may be sharded
    for axis, size in enumerate(bits.shape):
        index = index * size + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum((bits ^ (bits >> 15)) * (index * jnp.uint32(2654435761) + 1), dtype=jnp.uint32)


def shape_fingerprint(base: PyTree) -> str:
    """A name for a tree by its paths, shapes and dtypes alone: `fingerprint` compares only trees
    that agree in it."""
    digest = hashlib.sha256()
    for path, leaf in _arrays(base).items():
        digest.update(f"{path} {tuple(leaf.shape)} {leaf.dtype}\n".encode())
    return digest.hexdigest()[:16]
