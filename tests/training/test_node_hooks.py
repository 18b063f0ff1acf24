"""What a method declares beside its gradients: a penalty, and a move behind the optimizer."""

import dataclasses

import chex
import flax.struct
import jax
import jax.numpy as jnp
import optax
import pytest
import small

import lora_jax as lora
from lora_jax import training
from lora_jax.methods import LoRANode
from lora_jax.training.node_hooks import after_update, penalty
from lora_jax.training.resuming import require_same_init


@flax.struct.dataclass
class CappedNode(LoRANode):
    """Its b is held small by the loss, and no entry of any exceeds the largest gradient of all."""

    @classmethod
    def penalty(cls, nodes):
        return sum(jnp.sum(node.b**2) for node in nodes)

    @classmethod
    def after_update(cls, nodes, gradients, step):
        most = jnp.stack([jnp.abs(gradient.b).max() for gradient in gradients]).max() * step
        return [dataclasses.replace(node, b=jnp.clip(node.b, -most, most)) for node in nodes]


def made():
    base = small.params()
    _, delta = lora.lora_transform(
        base, lora.LoRA(rank=2), targets="attention", key=jax.random.key(0)
    )
    attn = {
        name: CappedNode(**{f.name: getattr(node, f.name) for f in dataclasses.fields(node)})
        if name in ("q_proj", "v_proj")
        else node
        for name, node in delta["layers"]["attn"].items()
    }
    return base, jax.tree.map(lambda x: x + 0.1, {"layers": {"attn": attn}})


def test_a_step_asks_all_nodes_of_a_class_together():
    base, delta = made()
    tx, batch = optax.sgd(0.5), small.batch(0)
    state = training.init_state(delta, tx, seed=0)
    moved, _ = jax.jit(training.train_step(small.LOSS, tx))(state, base, batch)

    def objective(delta):
        total, count = small.LOSS(delta, base, batch, None)
        attn = delta["layers"]["attn"]
        return total / count + jnp.sum(attn["q_proj"].b ** 2) + jnp.sum(attn["v_proj"].b ** 2)

    grads = jax.jit(jax.grad(objective))(delta)["layers"]["attn"]
    most = max(float(jnp.abs(grads[name].b).max()) for name in ("q_proj", "v_proj"))
    for name, node in delta["layers"]["attn"].items():
        expected = node.b - 0.5 * grads[name].b
        if name in ("q_proj", "v_proj"):
            expected = jnp.clip(expected, -most, most)
        chex.assert_trees_all_close(moved.delta["layers"]["attn"][name].b, expected, atol=1e-6)


def test_methods_without_hooks_add_no_operation():
    _, delta = lora.lora_transform(small.params(), lora.LoRA(rank=2), key=jax.random.key(0))
    assert penalty(delta) is None and penalty({}) is None

    def added(delta, gradients):
        return after_update(delta, gradients, jnp.int32(1))

    program = jax.make_jaxpr(added)(delta, delta)
    assert (
        not program.eqns and program.jaxpr.outvars == program.jaxpr.invars[: len(program.out_avals)]
    )


def test_of_adalora_they_are_its_public_functions():
    method = lora.AdaLoRA(rank=2, target_rank=1, total_steps=4)
    rules = {
        "q_proj": method,
        "k_proj": dataclasses.replace(method, penalty=0.1),
        ".*": lora.LoRA(),
    }
    _, delta = lora.lora_transform(small.params(), rules, key=jax.random.key(0))
    delta = jax.tree.map(lambda x: x + 0.1, delta)
    chex.assert_trees_all_equal(penalty(delta), lora.orthogonality(delta))
    step = jnp.int32(2)
    chex.assert_trees_all_equal(
        after_update(delta, delta, step), lora.allocate_budget(delta, delta, step)
    )


def test_a_run_goes_on_with_statistics_that_moved_but_not_with_another_scale(tmp_path):
    method = lora.AdaLoRA(rank=2, target_rank=1, total_steps=4)
    _, delta = lora.lora_transform(small.params(), {"q_proj": method}, key=jax.random.key(0))
    node = delta["layers"]["attn"]["q_proj"]

    def state(**changes):
        delta = {"q": dataclasses.replace(node, **changes)}
        return training.init_state(delta, optax.sgd(1.0), seed=0)

    moved = jax.tree.map(lambda x: x + 1, node.sensitivity)
    given = (tmp_path, ["one"], [state()])
    require_same_init(*given, [state(mask=0 * node.mask, sensitivity=moved, uncertainty=moved)])
    with pytest.raises(ValueError, match="q/scale shows"):
        require_same_init(*given, [state(scale=2 * node.scale)])
