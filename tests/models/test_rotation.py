"""A rotated Llama is the same function of other numbers."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import llama
from lora_jax.models.rotation import random_rotation, rotated


@pytest.mark.parametrize("tied", [False, True])
def test_a_rotation_changes_every_matrix_and_no_logit(tied):
    config, params, tokens = cases.llama_case(tie_embeddings=tied)
    rotation = random_rotation(config.hidden_size, key=jax.random.key(0))
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(16), atol=1e-5)
    turned = jax.jit(rotated)(params, rotation)
    forward = jax.jit(llama.forward, static_argnums=2)
    cases.assert_close(
        forward(turned, tokens, config), forward(params, tokens, config), rtol=1e-3, atol=1e-5
    )
    before = {**params["layers"]["attn"], **params["layers"]["mlp"]}
    after = {**turned["layers"]["attn"], **turned["layers"]["mlp"]}
    for name, weight in before.items():
        assert float(jnp.mean(jnp.abs(after[name] - weight) > 1e-3)) > 0.9
