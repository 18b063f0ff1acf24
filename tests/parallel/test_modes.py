"""Every way to run a step gives the numbers of one device, on eight simulated ones."""

import functools

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import parallel, training
from lora_jax.models import SHARDING, llama
from lora_jax.models.llama import LlamaConfig
from lora_jax.training.execution import single
from lora_jax.training.sweep import make_sweep

pytestmark = pytest.mark.mixed_dtypes  # Adam promotes

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=8,
    num_kv_heads=8,
    head_dim=8,
    context_length=64,
)
STEPS = 3
ARMS = [(1, 1e-2), (4, 3e-2)]


def params():
    return llama.init(CONFIG, key=jax.random.key(0))


def batch(seed, rows=8, length=16):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CONFIG.vocab_size, (rows, length + 1), dtype=np.int32)
    starts = rng.integers(4, length - 4, (rows, 1))
    segment_ids = 1 + (np.arange(length) >= starts).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": rng.random((rows, length)) < 0.5,
        "segment_ids": segment_ids,
        "positions": np.where(segment_ids == 2, np.arange(length) - starts, np.arange(length)),
    }


@functools.cache
def base_of(kind):
    if kind == "float32":
        return params()
    double = kind == "nf4, double"
    return lora.quantize(params(), "nf4", block_size=8, double_quant=double)


def run(kind, mode, execution, specs, method=lora.LoRA):
    """Each step's losses and gradient norms by arm, the validation's sums, the last states."""
    base = base_of(kind)
    tx = training.adamw(steps=STEPS)
    loss = training.next_token_loss(CONFIG, remat="full")
    if specs is not None:
        loss = parallel.over_mesh(loss, specs)
    step = training.train_step(loss, tx, axis_name=execution.axis_name)
    sweep = make_sweep(step, lambda *args: loss(*args, None), mode, execution)
    deltas = [
        lora.lora_transform(base, method(rank=rank), key=jax.random.key(rank))[1]
        for rank, _ in ARMS
    ]
    packed = sweep.pack(
        [
            training.init_state(delta, tx, learning_rate=rate, seed=0)
            for delta, (_, rate) in zip(lora.unstack(lora.stack(deltas)), ARMS, strict=True)
        ]
    )
    placed = execution.base(base)
    seen = []
    for i in range(STEPS):
        packed, metrics = sweep.step(packed, placed, batch(i), [True, True])
        seen.append([metrics.loss, metrics.grad_norm])
    totals, counts = sweep.evaluate(packed, placed, batch(100))
    seen.append([totals, counts])
    return np.asarray(jax.device_get(seen)), packed


@functools.cache
def alone(kind, method=lora.LoRA):
    return run(kind, "in_turn", single(), None, method)[0]


MESHES = {
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},
    "fsdp+tensor": {"fsdp": 4, "tensor": 2},
    "sequence": {"fsdp": 2, "sequence": 2, "tensor": 2},
    "arms": {"arms": 2, "fsdp": 2, "tensor": 2},
}
QUICK = [("arms", "nf4, double", "batched")]
MORE = [
    ("sequence", "float32", "in_turn"),
    *((name, "nf4, double", "in_turn") for name in ("fsdp", "tensor", "fsdp+tensor", "sequence")),
    *((name, "float32", "in_turn") for name in ("fsdp", "tensor")),
    ("fsdp+tensor", "nf4", "batched"),
    ("arms", "float32", "batched"),
]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]


@pytest.mark.parametrize("name, kind, mode", CASES)
def test_a_mesh_gives_the_numbers_of_one_device(name, kind, mode):
    mesh = parallel.make_mesh(MESHES[name])
    specs = parallel.match_specs(base_of(kind), SHARDING)
    ours, packed = run(kind, mode, parallel.on_mesh(mesh, specs), specs)
    np.testing.assert_allclose(ours, alone(kind), rtol=1e-5)
    for state in packed if mode == "in_turn" else [packed]:  # nothing has wandered
        lying = parallel.state_shardings(mesh, state, specs, arms=mode == "batched")
        same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, lying)
        assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("mode", ["in_turn", pytest.param("batched", marks=pytest.mark.slow)])
def test_pmap_gives_the_numbers_of_one_device(mode):
    ours, _ = run("nf4, double", mode, parallel.replicated(), None)
    np.testing.assert_allclose(ours, alone("nf4, double"), rtol=1e-5)


@pytest.mark.parametrize("mode", ["mesh", "pmap"])
def test_the_callers_state_outlives_the_step_that_donates_its_copy(mode):
    mesh = parallel.make_mesh({"fsdp": 8})
    specs = parallel.match_specs(base_of("float32"), SHARDING)
    execution = parallel.replicated() if mode == "pmap" else parallel.on_mesh(mesh, specs)
    delta = lora.lora_transform(base_of("float32"), lora.LoRA(rank=1), key=jax.random.key(0))[1]
    tx = training.adamw(steps=STEPS)
    state = training.init_state(delta, tx, seed=0)
    placed = execution.states(state, False)
    with execution.context():
        moved, _ = execution.change(lambda state: (state, None), consumes=True)(placed)
    assert moved is not None and all(np.isfinite(x).all() for x in jax.tree.leaves(state.delta))
