"""The methods beside LoRA as PEFT computes them: logits, loss, gradients, and steps of AdamW.

The values in tests/golden/peft_family.npz were recorded by scripts/record_golden_peft.py: every
seventh entry of each array.
"""

from pathlib import Path

import family_cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_llamas
from test_peft import config_of

import lora_jax as lora
from lora_jax.interop.model_tensors import assemble, leaves_of, names_of
from lora_jax.methods import DeltaNode, Extra
from lora_jax.models import llama
from lora_jax.training import token_losses

GOLDEN = Path(__file__).parents[1] / "golden" / "peft_family.npz"
pytestmark = pytest.mark.mixed_dtypes
VALUES = small_llamas.VARIANTS[family_cases.MODEL]
CONFIG = config_of(VALUES)
TARGETS = ("q_proj", "down_proj")

METHODS = {
    "dora": (lora.DoRA(rank=4, alpha=6.0), TARGETS),
    "ia3": ({"k_proj|v_proj": lora.IA3(), "down_proj": lora.IA3(scales="input")}, "all-linear"),
    "vera": (lora.VeRA(rank=6), ("k_proj", "down_proj")),
    "adalora": (
        lora.AdaLoRA(
            rank=6,
            target_rank=3,
            alpha=9.0,
            total_steps=50,
            warmup=5,
            final=8,
            interval=3,
            penalty=0.3,
        ),
        TARGETS,
    ),
    "prompt": (lora.Prompt(length=5), "embed"),
    "prefix": (lora.Prefix(length=5), "k_proj"),
    "prefix_mlp": (lora.Prefix(length=5, hidden=12), "k_proj"),
    "loraplus": (lora.LoRA(rank=4, alpha=6.0), TARGETS),
    "pissa": (lora.LoRA(rank=4, alpha=6.0, init="pissa"), TARGETS),
    "olora": (lora.LoRA(rank=4, alpha=6.0, init="olora"), TARGETS),
    "lorafa": (lora.LoRA(rank=4, alpha=6.0, train_a=False), TARGETS),
}
# PEFT's name and value, in its orientation, of each trained leaf of one layer's node.
LEAVES = {
    "LoRANode": {
        "lora_A.default.weight": lambda node: node.a.T,
        "lora_B.default.weight": lambda node: node.b.T,
    },
    "DoRANode": {
        "lora_A.default.weight": lambda node: node.a.T,
        "lora_B.default.weight": lambda node: node.b.T,
        "lora_magnitude_vector.default.weight": lambda node: node.magnitude,
    },
    "AdaLoRANode": {
        "lora_A.default": lambda node: node.a.T,
        "lora_E.default": lambda node: node.e[:, None],
        "lora_B.default": lambda node: node.b.T,
        "lora_E.default/mask": lambda node: node.mask,
    },
    "IA3Node": {"ia3_l.default": lambda node: node.l[:, None]},
    "IA3InputNode": {"ia3_l.default": lambda node: node.l[None]},
    "VeRANode": {
        "vera_lambda_b.default": lambda node: node.lambda_b,
        "vera_lambda_d.default": lambda node: node.lambda_d,
    },
}
# Likewise of what belongs to no weight.
ENCODER = "prompt_encoder.default"
EXTRAS = {
    "PromptNode": lambda node: {f"{ENCODER}.embedding.weight": node.rows},
    "PrefixNode": lambda node: {
        f"{ENCODER}.embedding.weight": by_token(jnp.stack([node.k, node.v], axis=1)),
    },
    "EncodedPrefixNode": lambda node: {
        f"{ENCODER}.embedding.weight": node.rows,
        f"{ENCODER}.transform.0.weight": node.w1.T,
        f"{ENCODER}.transform.0.bias": node.b1,
        f"{ENCODER}.transform.2.weight": jnp.swapaxes(node.w2, -1, -2).reshape(-1, 12),
        f"{ENCODER}.transform.2.bias": node.b2.reshape(-1),
    },
    "VeRAProjection": lambda node: {
        "base_model.vera_A.default": node.a.T,
        "base_model.vera_B.default": node.b.T,
    },
}


def by_token(pairs_LTPD):
    """Of each layer, keys then values; `[P, L * 2 * D]`."""
    return jnp.moveaxis(pairs_LTPD, 2, 0).reshape(pairs_LTPD.shape[2], -1)


def in_pefts_terms(delta) -> dict[str, jax.Array]:
    """`{PEFT's parameter: value}` of all that it has. It permutes: its transpose is its inverse."""
    found = {}
    for leaf in leaves_of(CONFIG, "huggingface"):
        if leaf.path not in (nodes := lora.transform.delta_nodes(delta)):
            continue
        node = nodes[leaf.path]
        for i, name in enumerate(names_of(leaf, "huggingface", CONFIG.num_layers)):
            module = name.removesuffix(".weight")
            layer = jax.tree.map(lambda x: x[i], node)  # noqa: B023
            for suffix, read in LEAVES[type(node).__name__].items():
                found[f"base_model.model.{module}.{suffix}"] = read(layer)
    for node in jax.tree.leaves(delta, is_leaf=lambda leaf: isinstance(leaf, DeltaNode)):
        if isinstance(node, Extra):
            found |= EXTRAS[type(node).__name__](node)
    return found


def started(delta):
    """The delta with every leaf that PEFT has as `family_cases.draw` gives it."""
    shapes = jax.eval_shape(in_pefts_terms, delta)
    known = {n: jnp.full(leaf.shape, float("/mask" not in n)) for n, leaf in shapes.items()}
    drawn = {n: known[n] * family_cases.draw(n, leaf.shape) for n, leaf in shapes.items()}
    back = jax.linear_transpose(in_pefts_terms, delta)
    [values], [known] = back(drawn), back(known)
    return jax.tree.map(lambda v, old, k: jnp.where(k != 0, v, old), values, delta, known)


def compute(name: str) -> dict[str, np.ndarray]:
    """The same quantities under PEFT's names, in its orientation."""
    params = assemble(CONFIG, "huggingface", small_llamas.draw_weights(VALUES).get, jnp.float32)
    method, targets = METHODS[name]
    case = family_cases.CASES[name]
    tokens = jnp.asarray(family_cases.TOKENS, jnp.int32)

    @jax.jit
    def prepare(params):
        base, delta = lora.lora_transform(params, method, targets=targets, key=jax.random.key(0))
        delta = delta if "own_start" in case else started(delta)
        return base, delta, optimizer_of(name, delta).init(delta)

    def loss_and_logits(delta, base):
        weights = lora.bind(base, delta)
        hidden = llama.hidden_states(weights, tokens, CONFIG)
        head = llama.output_head(weights)
        counted = jnp.ones((2, tokens.shape[1] - 1), bool)
        total, count = token_losses(hidden[:, :-1], head, tokens[:, 1:], counted)
        return total / count + lora.orthogonality(delta), lora.linear(hidden, head)

    @jax.jit
    def step(base, delta, state, number):
        gradient = jax.value_and_grad(loss_and_logits, has_aux=True)
        (loss, logits), grads = gradient(delta, base)
        updates, state = optimizer_of(name, delta).update(grads, state, delta)
        delta = lora.allocate_budget(optax.apply_updates(delta, updates), grads, number)
        noted = {"logits": logits, "loss": loss}, in_pefts_terms(grads), in_pefts_terms(delta)
        return delta, state, noted

    base, delta, state = prepare(params)
    trained = {n for n, v in in_pefts_terms(trains(delta)).items() if np.any(v)}
    found = {}
    for i in range(case.get("steps", family_cases.STEPS)):
        delta, state, (outputs, grads, after) = step(base, delta, state, i + 1)
        if i == 0:
            found |= outputs | {f"{n}/grad": v for n, v in grads.items() if n in trained}
    found |= {f"{n}/after": v for n, v in after.items() if n in trained}
    found |= {n: v for n, v in after.items() if n.endswith("/mask")}
    found = {key: np.asarray(value) for key, value in found.items()}
    if "own_start" in case:
        return {key: np.abs(value) if "/" in key else value for key, value in found.items()}
    return found


def trains(delta):
    """Zeros and ones in the delta's shapes, of numpy."""
    return jax.tree.map(
        lambda leaf, flag: np.full(leaf.shape, np.float32(flag)), delta, lora.trainable_mask(delta)
    )


def optimizer_of(name: str, delta):
    rate, decay = family_cases.LEARNING_RATE, family_cases.WEIGHT_DECAY
    if name == "loraplus":
        adamw = optax.adamw(rate, weight_decay=decay)
        return lora.mask_optimizer(adamw, delta, b_ratio=family_cases.B_RATIO)
    if name == "lorafa":
        adamw = optax.adamw(rate, eps=family_cases.NO_EPS, weight_decay=decay)
        return optax.chain(lora.project_b(), lora.mask_optimizer(adamw, delta))
    eps = family_cases.CASES[name].get("eps", 1e-8)
    return lora.mask_optimizer(optax.adamw(rate, eps=eps, weight_decay=decay), delta)


def assert_same(name, ours, theirs):
    start = 5e-5 if "own_start" in family_cases.CASES[name] else 1e-6  # float32's decompositions
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        tolerance = 1e-4 * np.abs(expected).max()
        if key.endswith("/after"):  # parameters begin near 1 at most, and move by 5e-3
            tolerance = start + 0.01 * family_cases.LEARNING_RATE
        assert np.abs(ours[key] - expected).max() <= tolerance, key


# The others differ from LoRA or from one of these by what tests of their own pin down.
@pytest.mark.sampled
@pytest.mark.parametrize(
    "name", ["dora", "ia3", "vera", "adalora", "prompt", "prefix_mlp", "pissa"]
)
def test_recorded_values(name):
    with np.load(GOLDEN) as file:
        golden = {k.partition(":")[2]: file[k] for k in file.files if k.startswith(f"{name}:")}
    assert golden
    assert_same(name, {key: value.reshape(-1)[::7] for key, value in compute(name).items()}, golden)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own use of transformers
@pytest.mark.parametrize("name", METHODS)
def test_the_installed_peft(name):
    pytest.importorskip("peft", reason="requirements-parity.txt is not installed")
    import family_model

    assert_same(name, compute(name), family_model.compute(name))
