"""LoRA as PEFT computes it: logits, loss, gradients, and three steps of AdamW.

The values in tests/golden/peft_*.npz were recorded by scripts/record_golden_peft.py.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft_cases
import pytest
import small_llamas

import lora_jax as lora
from lora_jax.interop.model_tensors import assemble, leaves_of, names_of
from lora_jax.models import llama
from lora_jax.models.config import RopeScaling
from lora_jax.models.llama import LlamaConfig
from lora_jax.training import token_losses
from lora_jax.transform import delta_nodes

GOLDEN = Path(__file__).parents[1] / "golden"
pytestmark = pytest.mark.mixed_dtypes


def config_of(values: dict) -> LlamaConfig:
    rope = values["rope_scaling"]
    return LlamaConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        num_kv_heads=values["num_key_value_heads"],
        head_dim=values["hidden_size"] // values["num_attention_heads"],
        context_length=values["max_position_embeddings"],
        rope_theta=values["rope_theta"],
        rope_scaling=rope and RopeScaling(
            factor=rope["factor"], original_context=rope["original_max_position_embeddings"]
        ),
        norm_eps=values["rms_norm_eps"],
        tie_embeddings=values["tie_word_embeddings"],
    )  # fmt: skip


def compute(name: str) -> dict[str, np.ndarray]:
    """The same quantities under PEFT's names, in its orientation."""
    case = peft_cases.CASES[name]
    values = small_llamas.VARIANTS[case["model"]]
    config, given = config_of(values), peft_cases.adapters(case)
    params = assemble(config, "huggingface", small_llamas.draw_weights(values).get, jnp.float32)
    method = lora.LoRA(
        rank=case["rank"], alpha=case["alpha"], scaling="rslora" if case["rslora"] else "lora"
    )
    base, delta = lora.lora_transform(
        params, method, targets=case["targets"], key=jax.random.key(0)
    )
    modules = {}  # path in our tree: PEFT's modules, layer by layer
    for leaf in leaves_of(config, "huggingface"):
        names = [
            n.removesuffix(".weight") for n in names_of(leaf, "huggingface", config.num_layers)
        ]
        if names[0] in given:
            modules[leaf.path] = names
            _, group, last = leaf.path.split("/")
            pairs = [given[n] for n in names]
            delta["layers"][group][last] = delta["layers"][group][last].replace(
                a=jnp.stack([a.T for a, _ in pairs]), b=jnp.stack([b.T for _, b in pairs])
            )
    assert sum(map(len, modules.values())) == len(given)
    tokens = jnp.asarray(peft_cases.TOKENS, jnp.int32)

    def loss_and_logits(delta):
        weights = lora.bind(base, delta)
        hidden = llama.hidden_states(weights, tokens, config)
        head = llama.output_head(weights)
        counted = jnp.ones((2, tokens.shape[1] - 1), bool)
        total, count = token_losses(hidden[:, :-1], head, tokens[:, 1:], counted)
        return total / count, lora.linear(hidden, head)

    tx = lora.mask_optimizer(
        optax.adamw(peft_cases.LEARNING_RATE, weight_decay=peft_cases.WEIGHT_DECAY), delta
    )

    @jax.jit
    def step(delta, state):
        (loss, logits), grads = jax.value_and_grad(loss_and_logits, has_aux=True)(delta)
        updates, state = tx.update(grads, state, delta)
        return optax.apply_updates(delta, updates), state, (loss, logits, grads)

    state, found = tx.init(delta), {}

    def note(tree, what):
        for path, names in modules.items():
            node = delta_nodes(tree)[path]
            for i, module in enumerate(names):
                found[f"{module}/{what}_a"], found[f"{module}/{what}_b"] = node.a[i].T, node.b[i].T

    for i in range(peft_cases.STEPS):
        delta, state, (loss, logits, grads) = step(delta, state)
        if i == 0:
            found |= {"logits": logits, "loss": loss}
            note(grads, "grad")
    note(delta, "after")
    return {key: np.asarray(value) for key, value in found.items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    start = 0.2  # A and B begin inside +-0.2, and three steps move them by 0.003
    for key, expected in theirs.items():
        tolerance = 1e-4 * np.abs(expected).max()
        if "/after_" in key:
            tolerance = 1e-5 * start + 0.01 * peft_cases.LEARNING_RATE
        assert np.abs(ours[key] - expected).max() <= tolerance, key


@pytest.mark.parametrize("name", peft_cases.CASES)
def test_recorded_values(name):
    with np.load(GOLDEN / f"peft_{name}.npz") as file:
        golden = {key: file[key] for key in file.files if key != "peft"}
    assert_same(compute(name), golden)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own use of transformers
@pytest.mark.parametrize("name", peft_cases.CASES)
def test_the_installed_peft(name):
    pytest.importorskip("peft", reason="requirements-parity.txt is not installed")
    import peft_model

    assert_same(compute(name), peft_model.compute(name))
