"""An optimizer whose state lives in host memory moves as one whose state does not."""

import importlib.util

import jax
import numpy as np
import optax
import pytest
import small
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax import training
from lora_jax.training import checkpoints
from lora_jax.training.sweep import make_sweep

ARMS = [(lora.LoRA(rank=2), "all-linear", rate, seed) for rate, seed in ((1e-2, 0), (3e-2, 1))]
RNG = np.random.default_rng(0)
BASE = {"q_proj": RNG.normal(size=(6, 5)).astype(np.float32)}
BATCHES = [{"x": RNG.normal(size=(4, 6)).astype(np.float32)} for _ in range(3)]


def loss_sum(delta, base, batch, key):
    """A quicker model than a Llama."""
    del key
    y = lora.linear(batch["x"], lora.bind(base, delta)["q_proj"])
    return (y**2).sum(), jax.numpy.float32(y.size)


def moments(states):
    return [leaf for leaf in jax.tree.leaves(states) if leaf.sharding.memory_kind == "pinned_host"]


def run(tx, mode):
    traces = []

    def counted(*args):
        traces.append(1)
        return loss_sum(*args)

    sweep = make_sweep(training.train_step(counted, tx), loss_sum, mode)
    packed = sweep.pack(small.states(BASE, ARMS, tx))
    for batch, running in zip(BATCHES, ([True, True], [True, False], [True, True]), strict=True):
        packed, _ = sweep.step(packed, BASE, batch, running)
    assert len(traces) == 1
    return packed, sweep.unpack(packed)


@pytest.mark.parametrize("mode", ["in_turn", "batched"])
def test_the_numbers_are_those_of_the_state_on_the_device(mode):
    tx = training.adamw(steps=4, warmup_steps=1)
    packed, states = run(training.paged(tx), mode)
    plain, expected = run(tx, mode)
    trained = sum(jax.tree.leaves(lora.trainable_mask(expected[0].delta)))
    arms = len(ARMS) if mode == "in_turn" else 1
    assert len(moments(packed)) == 2 * trained * arms and not moments(plain)
    for ours, theirs in zip(states, expected, strict=True):
        small.assert_equal(jax.device_get(ours), jax.device_get(theirs))


def test_checkpoints_come_back_into_host_memory(tmp_path):
    [state] = small.states(BASE, ARMS[:1], training.paged(training.adamw(steps=4)))
    state = jax.jit(lambda s: s)(state)
    checkpoints.save(tmp_path, 1, state, identity={}, position=None)
    _, restored, _ = checkpoints.restore(tmp_path, state, identity={})
    assert len(moments(restored)) == len(moments(state)) > 0
    small.assert_equal(jax.device_get(restored), jax.device_get(state))


def test_a_tpu_keeps_the_moments_on_the_host(monkeypatch):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for a TPU needs the libtpu wheel")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = Mesh(np.array(topology.devices[:1]), ("one",))
    tx = training.paged(training.adamw(steps=4))
    [state] = small.states(BASE, ARMS[:1], tx)

    def placed(leaf):
        kind = leaf.sharding.memory_kind if isinstance(leaf, jax.Array) else "device"
        sharding = NamedSharding(mesh, PartitionSpec(), memory_kind=kind)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    step = jax.jit(training.train_step(loss_sum, tx), donate_argnums=0)
    traced = step.trace(*jax.tree.map(placed, (state, BASE, BATCHES[0])))
    memory = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    bytes_of_moments = 4 * sum(leaf.size for leaf in moments(state))
    assert memory.host_argument_size_in_bytes >= bytes_of_moments
    assert memory.host_output_size_in_bytes >= bytes_of_moments


def test_any_optimizer_can_be_paged():
    params = {"a": jax.numpy.ones((3, 2))}
    results = []
    for tx in (optax.lion(0.1), training.paged(optax.lion(0.1))):
        state = tx.init(params)
        updates, state = jax.jit(tx.update)({"a": 0.5 * params["a"]}, state, params)
        results.append(jax.device_get((updates, state)))
    small.assert_equal(*results)
