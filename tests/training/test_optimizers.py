"""Every optimizer by name: optax's numbers, alone and in a sweep over arms of different shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

import lora_jax as lora
from lora_jax import parallel, training
from lora_jax.training.execution import single
from lora_jax.training.sweep import make_sweep

NAMES = list(training.optimizers.DIRECTIONS)
RNG = np.random.default_rng(0)
# Small enough that no tanh is saturated: there a gradient is rounding, which Adam makes a step of.
BASE = {
    "layers": {"q_proj": 0.3 * RNG.normal(size=(2, 8, 8)).astype(np.float32)},  # two stacked layers
    "out": RNG.normal(size=(8, 12)).astype(np.float32),
}
STEPS, ARMS = 5, ((1, "q_proj", 1e-2), (3, "all-linear", 2e-2), (8, "all-linear", 2e-2))
BATCHES = [{"tokens": RNG.normal(size=(4, 8)).astype(np.float32)} for _ in range(STEPS)]
SPECS = {"layers/q_proj": jax.P(None, "fsdp", "tensor"), "out": jax.P("fsdp", "tensor")}


def loss_sum(delta, base, batch, key=None):
    del key
    weights, x = lora.bind(base, delta), batch["tokens"]
    for layer in range(2):
        x = lora.linear(x, jax.tree.map(lambda leaf: leaf[layer], weights["layers"]["q_proj"]))  # noqa: B023
    y = lora.linear(jnp.tanh(x), weights["out"])
    return ((y - 1) ** 2).sum(), jnp.float32(y.size)


def optimizer_of(name):
    return training.optimizer(name, steps=STEPS + 1, warmup_steps=1, weight_decay=0.1)


def states_of(name, method, arms=ARMS):
    return [
        training.init_state(
            lora.lora_transform(BASE, method(rank=rank), targets=targets, key=jax.random.key(rank))[
                1
            ],
            optimizer_of(name),
            learning_rate=rate,
            seed=0,
        )
        for rank, targets, rate in arms
    ]


@functools.cache
def alone(name, method):
    """Each arm in its own shapes, by a plain jitted step."""
    step = jax.jit(training.train_step(loss_sum, optimizer_of(name)))
    ends = []
    for state in states_of(name, method):
        for batch in BATCHES:
            state, metrics = step(state, BASE, batch)
        ends.append((state, metrics))
    return ends


def swept(name, method, mode, execution):
    traces = []

    def counted(*args):
        traces.append(1)
        return loss_sum(*args)

    step = training.train_step(counted, optimizer_of(name), axis_name=execution.axis_name)
    sweep = make_sweep(step, loss_sum, mode, execution)
    packed, base = sweep.pack(states_of(name, method)), execution.base(BASE)
    for batch in BATCHES:
        packed, metrics = sweep.step(packed, base, batch, [True] * len(ARMS))
    return sweep.unpack(packed), metrics, len(traces)


def assert_as_alone(name, method, mode, execution):
    states, metrics, traces = swept(name, method, mode, execution)
    assert traces == 1
    for i, (state, last) in enumerate(alone(name, method)):
        small.assert_close(jax.device_get(states[i].delta), state.delta)
        small.assert_close(jax.device_get(states[i].opt_state), state.opt_state)
        assert metrics.loss[i] == pytest.approx(float(last.loss), rel=1e-5)
        assert metrics.grad_norm[i] == pytest.approx(float(last.grad_norm), rel=1e-4)


METHODS = {"LoRA": lora.LoRA, "DoRA": lora.DoRA}
SLOW = pytest.mark.slow
QUICK = [("adamw", "LoRA"), ("adafactor", "LoRA"), ("sgd", "LoRA"), ("muon", "DoRA")]


@pytest.mark.sampled
@pytest.mark.parametrize("mode", ["in_turn", "batched"])
@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=[] if (name, method) in QUICK else SLOW)
        for name in NAMES
        for method in METHODS
    ],
)
def test_arms_of_different_shapes_end_where_they_end_alone(name, method, mode):
    """To float32 rounding: gradients of padded factors sum in another order."""
    assert_as_alone(name, METHODS[method], mode, single())


MESH = {"arms": 1, "fsdp": 4, "tensor": 2}
PLACES = {
    "fsdp": lambda: parallel.on_mesh(parallel.make_mesh(MESH), SPECS),
    "pmap": lambda: parallel.replicated(jax.devices()[:4]),
}


@pytest.mark.parametrize(
    ("name", "mode", "place"),
    [
        pytest.param("muon", "batched", "fsdp", marks=SLOW),
        ("adafactor", "in_turn", "fsdp"),
        pytest.param("adafactor", "batched", "pmap", marks=SLOW),
        pytest.param("muon", "in_turn", "pmap", marks=SLOW),
        pytest.param("adamw", "in_turn", "fsdp", marks=SLOW),
    ],
)
def test_so_they_do_on_several_devices(name, mode, place):
    assert_as_alone(name, lora.LoRA, mode, PLACES[place]())


@pytest.mark.parametrize("mode", ["in_turn", "batched"])
def test_a_stopped_arm_of_another_shape_keeps_its_state(mode):
    sweep = make_sweep(training.train_step(loss_sum, optimizer_of("adafactor")), loss_sum, mode)
    first = states_of("adafactor", lora.LoRA)
    packed, _ = sweep.step(sweep.pack(first), BASE, BATCHES[0], [False, True, False])
    one, two, three = sweep.unpack(packed)
    small.assert_equal((one, three), (first[0], first[2]))
    assert int(two.step) == 1


def scheduled(rate):
    fraction = training.optimizers.unit_schedule("cosine", 10, 3)
    return lambda count: rate * fraction(count)


OPTAX = {
    "adamw": lambda rate: optax.adamw(rate, weight_decay=0.0),
    "muon": optax.contrib.muon,
    "adafactor": optax.adafactor,
    "sgd": optax.sgd,
    "lion": lambda rate: optax.lion(rate, weight_decay=0.0),
}


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_is_optax_s(name):
    params = {"w": jnp.arange(6.0).reshape(2, 3) / 6, "v": jnp.arange(1.0, 4.0)}
    ours = training.optimizer(name, steps=10, warmup_steps=3, clip_norm=0.5, learning_rate=0.02)
    theirs = optax.chain(optax.clip_by_global_norm(0.5), OPTAX[name](scheduled(0.02)))

    def run(tx):
        def step(carry, i):
            params, state = carry
            grads = jax.tree.map(lambda x: jnp.sin(x + i), params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (moved, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(9.0))
        return moved

    mine, other = jax.jit(lambda: (run(ours), run(theirs)))()
    small.assert_close(mine, other, 1e-6)
    assert not np.allclose(mine["w"], params["w"])


def test_adamw_has_the_numbers_that_it_had():
    """The order of its products is that of 0.1.0: direction, decay, schedule, rate."""
    params, rate = {"w": jnp.arange(6.0).reshape(2, 3)}, jnp.float32(0.02)
    ours = training.adamw(steps=10, warmup_steps=3, weight_decay=0.1, learning_rate=0.02)
    before = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.1),
        optax.scale_by_schedule(training.optimizers.unit_schedule("cosine", 10, 3)),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u: -rate * u, updates)),
    )
    ends = []
    for tx in (ours, before):
        moved, state = params, tx.init(params)
        for i in range(4):
            grads = {"w": jnp.sin(jnp.arange(6.0) + i).reshape(2, 3)}
            updates, state = tx.update(grads, state, moved)
            moved = optax.apply_updates(moved, updates)
        ends.append(moved)
    small.assert_equal(*ends)


def test_muon_orthogonalises_each_layer_and_leaves_vectors_to_adam():
    """Stacked layers, kernels of three axes, magnitudes, a flattened stack: what each becomes."""
    params = {"stack": RNG.normal(size=(2, 8, 6)), "heads": RNG.normal(size=(8, 2, 3))}
    params = {name: leaf.astype(np.float32) for name, leaf in params.items()}
    layouts = {"heads": lora.Layout(contracted=(-3,), output=(-2, -1))}
    _, delta = lora.lora_transform(
        params, lora.DoRA(rank=2), targets=".*", key=jax.random.key(0), layouts=layouts
    )
    grads = jax.tree.map(lambda x: jnp.cos(jnp.arange(float(x.size))).reshape(x.shape), delta)
    tx = lora.mask_optimizer(training.muon(), delta)
    updates, _ = jax.jit(tx.update)(grads, tx.init(delta), delta)

    def singular(matrix):
        return np.linalg.svd(np.asarray(matrix), compute_uv=False)

    for node in (updates["stack"], updates["heads"].as_matrix()):
        for factor, wide in ((node.a, 1), (node.b, np.sqrt(6 / 2))):
            # Newton and Schulz's five steps leave what is orthogonal between 0.5 and 1.5.
            assert np.all(np.abs(singular(factor) / wide - 1) < 0.5)
    _, layer = lora.lora_transform(
        {"stack": params["stack"][1]}, lora.DoRA(rank=2), targets=".*", key=jax.random.key(0)
    )
    one = lora.mask_optimizer(training.muon(), layer)
    its = {"stack": jax.tree.map(lambda leaf: leaf[1], grads["stack"])}
    apart, _ = jax.jit(one.update)(its, one.init(layer), layer)
    small.assert_close(jax.tree.map(lambda leaf: leaf[1], updates["stack"]), apart["stack"], 1e-4)
    sizes = jnp.abs(updates["stack"].magnitude)  # Adam's first update is of one size everywhere
    np.testing.assert_allclose(sizes, np.full(sizes.shape, sizes[0, 0]), rtol=1e-4)


def test_muon_refuses_a_full_delta():
    params = {"stack": np.ones((2, 8, 6), np.float32), "norm": np.ones(8, np.float32)}
    _, delta = lora.lora_transform(params, lora.Full(), targets=".*", key=jax.random.key(0))
    tx = training.optimizer("muon", steps=3)
    with pytest.raises(ValueError, match=r"stack: Muon cannot move a Full delta of shape \(2, 8"):
        training.init_state(delta, tx, learning_rate=1.0, seed=0)
    training.init_state({"norm": delta["norm"]}, tx, learning_rate=1.0, seed=0)


def test_unknown_names_and_rates_that_nobody_keeps_are_refused():
    with pytest.raises(ValueError, match="'adam': expected one of adamw, muon, adafactor, sgd, li"):
        training.optimizer("adam", steps=3)
    _, delta = lora.lora_transform(BASE, lora.LoRA(rank=1), key=jax.random.key(0))
    with pytest.raises(ValueError, match="learning_rate=0.5 is given, but the optimizer's state"):
        training.init_state(delta, optax.sgd(0.1), learning_rate=0.5, seed=0)
    injected = optax.inject_hyperparams(optax.sgd)(0.1)
    state = training.init_state(delta, injected, learning_rate=0.5, seed=0)
    assert float(optax.tree.get(state.opt_state, "learning_rate")) == 0.5


def test_a_rate_that_nobody_set_shows():
    tx = training.adamw(steps=3, schedule="constant")
    updates, _ = tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}), {"w": jnp.ones(2)})
    assert np.isnan(updates["w"]).all()
