"""EVA as PEFT computes it: the principal directions of inputs, and the ranks they get.

PEFT passes over its batches with an incremental, randomised PCA until the directions turn no more.
Over one batch, again and again, its limit is the PCA of that batch, which is what we compute. Its
random subspace has 2 * RANK * RHO dimensions: all 64 of attention's inputs, a part of the MLP's
112. The directions agree to 1 - cos = 5e-7, float32's own error; the ranks agree exactly.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_llamas
from test_peft import config_of

import lora_jax as lora
from lora_jax.interop.model_tensors import assemble
from lora_jax.models import llama
from lora_jax.transform import delta_nodes

VALUES = small_llamas.VARIANTS["llama3_1"]
CONFIG = config_of(VALUES)
TOKENS = np.array([[(i * i + 3 * i * row + 11 * row) % 80 for i in range(24)] for row in range(6)])
RANK, RHO = 16, 2.0
MODULES = {"layers/attn/q_proj": "self_attn.q_proj", "layers/attn/o_proj": "self_attn.o_proj",
           "layers/mlp/down_proj": "mlp.down_proj"}  # fmt: skip
TARGETS = ("q_proj", "o_proj", "down_proj")
pytestmark = pytest.mark.mixed_dtypes


def ours() -> dict[str, np.ndarray]:
    """Under PEFT's names, the directions `[rank, d_in]` of each module."""
    params = assemble(CONFIG, "huggingface", small_llamas.draw_weights(VALUES).get, jnp.float32)

    @jax.jit
    def covariances(params):
        def loss(weights):
            return llama.forward(weights, TOKENS, CONFIG).sum()

        return lora.input_covariances(loss, params, targets=TARGETS)

    found = covariances(params)
    importance = lora.input_importance(found, rank=round(RANK * RHO))
    budget = RANK * len(MODULES) * CONFIG.num_layers
    rules = lora.allocate_ranks(importance, budget=budget)
    _, delta = lora.lora_transform(params, rules, key=jax.random.key(0))
    started = delta_nodes(lora.eva_start(delta, found))
    directions = {}
    for path, module in MODULES.items():
        for layer, rank in enumerate(rules[path].rank):
            name = f"model.layers.{layer}.{module}"
            directions[name] = np.asarray(started[path].a[layer, :, :rank]).T
    return directions


def theirs() -> dict[str, np.ndarray]:
    import family_model
    import peft
    import torch

    config = peft.LoraConfig(
        r=RANK,
        target_modules=list(TARGETS),
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=RHO, tau=0.9999),
    )
    batches = [{"input_ids": torch.from_numpy(TOKENS)}]
    found = peft.get_eva_state_dict(
        family_model.base(), batches, peft_config=config, show_progress_bar=False
    )
    return {name: value.numpy() for name, value in found.items()}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own use of transformers
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_directions_and_ranks():
    pytest.importorskip("peft", reason="requirements-parity.txt is not installed")
    mine, peers = ours(), theirs()
    ranks = {name: len(rows) for name, rows in mine.items()}
    assert ranks == {name: len(rows) for name, rows in peers.items()}
    assert len(set(ranks.values())) > 2  # they were redistributed
    for name, rows in mine.items():  # unit vectors, each up to its sign
        cosines = np.abs(np.sum(rows * peers[name], axis=1))
        assert cosines.min() > 1 - 2e-6, name
