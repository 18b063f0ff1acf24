"""The same Llama in another basis of its residual stream.

Dimensions: D hidden, F intermediate, V vocabulary, L layers, E = N * H attention width.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models.decoder import output_head
from lora_jax.models.family import Params
from lora_jax.paths import one_key
from lora_jax.weights import dense


def random_rotation(size: int, *, key: jax.Array) -> jax.Array:
    """An orthogonal `[size, size]` matrix, uniform over all of them, float32."""
    q, r = jnp.linalg.qr(jax.random.normal(one_key(key), (size, size), jnp.float32))
    return q * jnp.sign(jnp.diagonal(r))[None]


def rotated(params: Params, rotation_DD: jax.Array) -> Params:
    """Params that compute the same function with the residual stream rotated by `rotation_DD`.

    Each norm's scale moves into the weights that read its output, which leaves `rms_norm` without
    a preferred basis; weights that read the stream are rotated on their rows, those that write it
    on their columns. The result has a head of its own, and every matrix holds new numbers: so the
    weights of a quantised file are no longer on its grid, while the model is the same up to
    rounding.

    Args:
      params: the tree of `llama`, of plain arrays.
      rotation_DD: an orthogonal matrix.

    Source: Ashkboos et al. 2024, arXiv:2404.00456, section 4.
    """
    with jax.default_matmul_precision("highest"):
        return _rotated(params, rotation_DD)


def _rotated(params: Params, rotation_DD: jax.Array) -> Params:
    layers = params["layers"]

    def reads(weight: Any, scale: jax.Array) -> jax.Array:
        scaled = weight.astype(jnp.float32) * scale.astype(jnp.float32)[..., None]
        return jnp.matmul(rotation_DD.T, scaled).astype(weight.dtype)

    def writes(weight: jax.Array) -> jax.Array:
        return jnp.matmul(weight.astype(jnp.float32), rotation_DD).astype(weight.dtype)

    attn, mlp = layers["attn"], layers["mlp"]
    readers = {
        name: reads(attn[name], layers["attn_norm"]) for name in ("q_proj", "k_proj", "v_proj")
    }
    gates = {name: reads(mlp[name], layers["mlp_norm"]) for name in ("gate_proj", "up_proj")}
    return {
        "embed": writes(params["embed"]),
        "layers": {
            "attn_norm": jnp.ones_like(layers["attn_norm"]),
            "attn": {**readers, "o_proj": writes(attn["o_proj"])},
            "mlp_norm": jnp.ones_like(layers["mlp_norm"]),
            "mlp": {**gates, "down_proj": writes(mlp["down_proj"])},
        },
        "norm": jnp.ones_like(params["norm"]),
        "lm_head": reads(dense(output_head(params)), params["norm"]),
    }
