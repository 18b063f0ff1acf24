"""Several deltas as one: exact in value and throughout training."""

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import X, assert_close, moved

import lora_jax as lora
from lora_jax.models import llama
from lora_jax.training import adamw, init_state, train_step

CASES = {"nested": cases.nested, "stacked": cases.stacked}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def mixed(case):
    """Members of different ranks, scales and targets."""
    targets = ["q_proj", "all-linear", "all-linear"]
    return [
        cases.transform(case, lora.LoRA(rank=rank, alpha=alpha), targets=target)[1]
        for rank, alpha, target in zip((1, 2, 4), (2, 16, 8), targets, strict=True)
    ]


def test_padded_members_compute_what_they_did(case):
    deltas = [moved(delta, i) for i, delta in enumerate(mixed(case))]
    outputs = jax.vmap(lambda d: case.apply(lora.bind(case.params, d), X))(lora.stack(deltas))
    for output, delta in zip(outputs, deltas, strict=True):
        assert_close(output, case.apply(lora.bind(case.params, delta), X), atol=5e-6)


def test_unstack_like_inverts(case):
    deltas = [moved(delta, i) for i, delta in enumerate(mixed(case))]
    for back, delta in zip(lora.unstack(lora.stack(deltas), like=deltas), deltas, strict=True):
        chex.assert_trees_all_equal(back, delta)


def test_unstack_alone_keeps_the_common_shape(case):
    members = lora.unstack(lora.stack(mixed(case)))
    assert {node.rank for m in members for node in jax.tree.leaves(
        m, is_leaf=lambda x: hasattr(x, "rank"))} == {4}  # fmt: skip
    assert len({jax.tree.structure(member) for member in members}) == 1


def test_stack_under_jit_and_eval_shape(case):
    deltas = mixed(case)
    chex.assert_trees_all_equal(jax.jit(lora.stack)(deltas), lora.stack(deltas))
    shapes = jax.eval_shape(lora.stack, deltas)
    assert jax.tree.map(jnp.shape, lora.stack(deltas)) == jax.tree.map(lambda s: s.shape, shapes)


@pytest.mark.slow
@pytest.mark.mixed_dtypes
def test_training_through_vmap_is_training_alone():
    """Several steps of AdamW with decay and a clip; padding and absent targets stay zero."""
    case = cases.nested()
    deltas, tx = mixed(case), adamw(steps=20, weight_decay=0.1, clip_norm=0.5)
    rates = [1e-2, 3e-2, 1e-2]

    def loss_sum(delta, base, batch, key):
        del key
        error = case.apply(lora.bind(base, delta), batch) - 1
        return (error**2).sum(), jnp.float32(error.size)

    step = train_step(loss_sum, tx)

    def run(step, state):
        for _ in range(5):
            state, metrics = step(state, case.params, X)
        return state, metrics

    def states(deltas):
        return [
            init_state(delta, tx, learning_rate=rate, seed=0)
            for delta, rate in zip(deltas, rates, strict=True)
        ]

    padded = states(lora.unstack(lora.stack(deltas)))
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *padded)
    together, metrics = run(jax.jit(jax.vmap(step, in_axes=(0, None, None))), together)
    trained = lora.unstack(together.delta, like=deltas)
    solo = jax.jit(step)
    for i, state in enumerate(states(deltas)):
        alone, last = run(solo, state)
        assert_close(trained[i], alone.delta, rtol=1e-4, atol=1e-5)
        assert np.isclose(metrics.loss[i], last.loss, rtol=1e-5)
        assert np.isclose(metrics.grad_norm[i], last.grad_norm, rtol=1e-4)
    assert_padding_is_zero(together.delta, deltas)


def assert_padding_is_zero(stacked, deltas):
    """What is cut back and padded anew is what was there."""
    trimmed, widest = lora.unstack(stacked, like=deltas), deltas[-1]
    for member, narrow in zip(lora.unstack(stacked), trimmed, strict=True):
        chex.assert_trees_all_equal(member, lora.unstack(lora.stack([narrow, widest]))[0])


@pytest.mark.mixed_dtypes
def test_optax_adam_leaves_padding_at_zero():
    """Also by hand, with an optimizer that is not ours."""
    case = cases.stacked()
    deltas = mixed(case)
    member = lora.unstack(lora.stack(deltas))[0]
    tx = lora.mask_optimizer(optax.adamw(1e-1), member)

    @jax.jit
    def step(delta, state):
        gradients = jax.grad(lambda d: (case.apply(lora.bind(case.params, d), X) ** 2).sum())(delta)
        updates, state = tx.update(gradients, state, delta)
        return optax.apply_updates(delta, updates), state

    state = tx.init(member)
    for _ in range(4):
        member, state = step(member, state)
    node = member["layers"]["q_proj"]
    assert np.any(node.b[..., :1, :]) and not np.any(node.b[..., 1:, :])
    assert np.any(node.a[..., :1]) and not np.any(node.a[..., 1:])


def test_full_deltas_stack_and_an_absent_one_is_zero():
    case = cases.nested()
    one, both = (
        moved(cases.transform(case, lora.Full(), targets=t)[1]) for t in ("q_proj", "all-linear")
    )
    member = lora.unstack(lora.stack([one, both]))[0]
    assert not np.any(member["out"]["down_proj"].delta)
    assert_close(case.apply(lora.bind(case.params, member), X),
                 case.apply(lora.bind(case.params, one), X))  # fmt: skip


def test_each_row_uses_its_own_adapter(case):
    deltas = [moved(delta, i) for i, delta in enumerate(mixed(case))]
    ids = jnp.array([2, 0, 1])
    together = case.apply(lora.bind(case.params, lora.stack(deltas), adapter_ids=ids), X)
    for row, i in enumerate([2, 0, 1]):
        alone = case.apply(lora.bind(case.params, deltas[i]), X)
        assert_close(together[row], alone[row], atol=5e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_each_row_of_a_llama_uses_its_own_adapter(tied):
    config, params, tokens = cases.llama_case(tie_embeddings=tied)
    tokens = jnp.concatenate([tokens, tokens])
    rules = [
        {"up_proj|v_proj": lora.LoRA(rank=2), "embed": lora.LoRA(rank=3)},
        {"v_proj": lora.LoRA(rank=4, alpha=8)},
        {"o_proj": lora.LoRA(rank=1)},
    ]
    deltas = [cases.llama_delta(params, rule, i) for i, rule in enumerate(rules)]
    forward = jax.jit(llama.forward, static_argnums=2)
    ids = jnp.array([1, 0, 2, 1])
    deltas = lora.stack(deltas)
    together = forward(lora.bind(params, deltas, adapter_ids=ids), tokens, config)
    solo = [forward(lora.bind(params, d), tokens, config) for d in lora.unstack(deltas)]
    for row, i in enumerate([1, 0, 2, 1]):
        assert_close(together[row], solo[i][row], rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_adapters_that_rows_use():
    case = cases.stacked()
    deltas = lora.stack([moved(cases.transform(case, lora.LoRA(rank=2))[1], i) for i in range(3)])

    def loss(deltas):
        weights = lora.bind(case.params, deltas, adapter_ids=jnp.array([2, 0, 2]))
        return (case.apply(weights, X) ** 2).sum()

    gradient = jax.grad(loss)(deltas)["layers"]["q_proj"]
    assert [bool(np.any(gradient.b[i])) for i in range(3)] == [True, False, True]
    assert not np.any(gradient.scale)


def test_stack_of_nothing():
    with pytest.raises(ValueError, match="at least one delta"):
        lora.stack([])


@pytest.mark.parametrize("other", [lora.Full(), lora.LoRA(rank=2, dropout=0.1)])
def test_different_methods_on_one_path(other):
    case = cases.nested()
    deltas = [cases.transform(case, method)[1] for method in (lora.LoRA(rank=2), other)]
    with pytest.raises(ValueError, match="block/q_proj: cannot stack LoRANode.. with"):
        lora.stack(deltas)


def test_unstack_like_another_number_of_deltas():
    delta = cases.transform(cases.nested(), lora.LoRA(rank=2))[1]
    with pytest.raises(ValueError, match="holds 2 deltas, but `like` lists 1"):
        lora.unstack(lora.stack([delta, delta]), like=[delta])
