"""By how much two programs of one model may differ."""

import jax.numpy as jnp

from lora_jax import paths
from lora_jax.weights import PyTree, is_weight

FLOAT32, NARROWER = 0.01, 0.2  # nats a token, on average


def tolerance_of(base: PyTree) -> float:
    """The mean difference of log-probabilities, in nats a token, above which two programs do not
    run the same model. Sampler and trainer of SmolLM2-135M on a CPU differ by 5e-6 in float32 and
    by 0.04 in bfloat16; accelerators round float32 products more coarsely."""
    arrays = filter(paths.is_array, paths.flatten(base, is_leaf=is_weight).values())
    floats = [leaf.dtype for leaf in arrays if jnp.issubdtype(leaf.dtype, jnp.floating)]
    narrow = any(jnp.finfo(dtype).bits < 32 for dtype in floats)
    return NARROWER if narrow else FLOAT32
