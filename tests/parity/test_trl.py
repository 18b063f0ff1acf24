"""Preferences as trl learns them: the loss of five steps, the first gradients, and A and B after.

The values in tests/golden/trl.npz were recorded by scripts/record_golden_trl.py.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft_cases
import pytest
import small_llamas
import trl_cases
from test_peft import config_of

import lora_jax as lora
from lora_jax import training
from lora_jax.interop.model_tensors import assemble, leaves_of, names_of
from lora_jax.training import policy
from lora_jax.training.losses.target_log_probs import sequences
from lora_jax.transform import delta_nodes

GOLDEN = Path(__file__).parents[1] / "golden" / "trl.npz"
LENGTH = 16
pytestmark = pytest.mark.mixed_dtypes


def start():
    """Base, delta, and trl's names of its modules by their paths."""
    values = small_llamas.VARIANTS[trl_cases.MODEL]
    config, adapter = config_of(values), trl_cases.ADAPTER
    base = assemble(config, "huggingface", small_llamas.draw_weights(values).get, jnp.float32)
    method = lora.LoRA(rank=adapter["rank"], alpha=adapter["alpha"])
    given = peft_cases.adapters(adapter)
    _, delta = lora.lora_transform(base, method, targets=adapter["targets"], key=jax.random.key(0))
    modules = {}
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
    return config, base, delta, modules


def batches(name):
    """Each step's rows: pairs, or for KTO an answer and the one before it in its batch."""
    rows = trl_cases.judged() if name == "kto" else trl_cases.pairs()
    for first in range(0, len(rows), trl_cases.ROWS):
        cut = rows[first : first + trl_cases.ROWS]
        if name == "kto":
            answers = [(r["completion"], cut[i - 1]["completion"]) for i, r in enumerate(cut)]
        else:
            answers = [(r["chosen"], r["rejected"]) for r in cut]
        batch = {
            field: np.zeros((len(cut), 2, LENGTH), bool if field == "loss_mask" else np.int32)
            for field in ("tokens", "targets", "loss_mask", "segment_ids", "positions")
        }
        for i, row in enumerate(cut):
            for slot in range(2):
                ids, at = row["prompt"] + answers[i][slot], len(row["prompt"]) - 1
                n = len(ids) - 1
                batch["tokens"][i, slot, :n], batch["targets"][i, slot, :n] = ids[:-1], ids[1:]
                batch["loss_mask"][i, slot, at:n] = True
                batch["segment_ids"][i, slot, :n] = 1
                batch["positions"][i, slot, :n] = np.arange(n)
        if name == "kto":
            batch["desirable"] = np.tile([[row["label"]] for row in cut], (1, LENGTH))
        yield batch


def compute(name):
    config, base, delta, modules = start()
    make = training.LOSSES["dpo" if name == "dpo_smoothed" else name].make
    loss = make(config, **trl_cases.CASES[name])
    settings = {"reference": delta} if "reference" in loss.settings else {}
    tx, found, losses = optax.sgd(trl_cases.LEARNING_RATE), {}, []
    state = training.init_state(delta, tx, seed=0, settings=settings)
    step = training.train_step(loss, tx)

    @jax.jit
    def moved(state, base, batch):
        grads, value, _ = step.gradients(state, base, batch)
        return step.update(state, grads)[0], value, grads

    def note(tree, what):
        for path, names in modules.items():
            node = delta_nodes(tree)[path]
            for i, module in enumerate(names):
                found[f"{module}/{what}_a"], found[f"{module}/{what}_b"] = node.a[i].T, node.b[i].T

    for batch in batches(name):
        state, value, grads = moved(state, base, batch)
        if not losses:
            note(grads, "grad")
        losses.append(value)
    note(state.delta, "after")
    return {"losses": np.array(losses)} | {key: np.asarray(x) for key, x in found.items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        tolerance = (1e-5 if key == "losses" else 2e-4) * np.abs(expected).max()
        np.testing.assert_allclose(ours[key], expected, rtol=0, atol=tolerance, err_msg=key)


@pytest.mark.parametrize("name", trl_cases.CASES)
def test_recorded_values(name):
    with np.load(GOLDEN) as file:
        golden = {k.split(":")[1]: file[k] for k in file.files if k.startswith(f"{name}:")}
    assert_same({key: value.reshape(-1)[::5] for key, value in compute(name).items()}, golden)


@pytest.mark.filterwarnings("ignore")  # of trl, transformers and datasets
@pytest.mark.parametrize("name", trl_cases.CASES)
def test_the_installed_trl(name):
    pytest.importorskip("trl", reason="requirements-parity.txt is not installed")
    import trl_model

    assert_same(compute(name), trl_model.compute(name))


def grpo(arrays, *, dr):
    """The loss of given log-probabilities, as `losses/grpo.py` puts it together."""

    def loss(log_probs):
        losses = policy.clipped(
            log_probs, arrays["sampler"], arrays["advantages"][:, None], low=0.2, high=0.25
        ) + arrays["beta"] * policy.k3(log_probs, arrays["reference"])
        batch = {"loss_mask": arrays["mask"], "segment_ids": arrays["mask"].astype(np.int32)}
        found = sequences(jnp.where(arrays["mask"], losses, 0), batch)
        rows = (found.lengths > 0).sum()
        return (found.log_probs / losses.shape[1] if dr else found.means).sum() / rows

    return jax.value_and_grad(loss)(jnp.asarray(arrays["policy"]))


@pytest.mark.parametrize("dr", [False, True])
def test_the_recorded_grpo(dr):
    with np.load(GOLDEN) as file:
        theirs = file[f"grpo:{dr}:loss"], file[f"grpo:{dr}:gradient"]
        worth = file[f"grpo:{dr}:advantages"]
    arrays = trl_cases.rollouts()
    for ours, expected in zip(grpo(arrays, dr=dr), theirs, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
    ours = policy.group_advantages(arrays["rewards"], scale=not dr)
    np.testing.assert_allclose(ours, worth, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dr", [False, True])
def test_the_installed_grpo(dr):
    pytest.importorskip("trl", reason="requirements-parity.txt is not installed")
    import trl_model

    arrays = trl_cases.rollouts()
    theirs = trl_model.grpo(arrays, dr=dr)
    for ours, expected in zip(grpo(arrays, dr=dr), theirs, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
    ours = policy.group_advantages(arrays["rewards"], scale=not dr)
    expected = trl_model.advantages(arrays["rewards"], scale=not dr)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
