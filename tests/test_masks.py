"""What an optimizer may move."""

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import X, assert_close, moved

import lora_jax as lora

pytestmark = pytest.mark.mixed_dtypes


def names_of(tree, flags):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {name for name, flag in zip(names, jax.tree.leaves(flags), strict=True) if flag}


def test_mask_of_a_delta_is_a_and_b():
    delta = cases.transform(cases.nested(), lora.LoRA(rank=2))[1]
    assert names_of(delta, lora.trainable_mask(delta)) == {
        "block/q_proj/a", "block/q_proj/b", "out/down_proj/a", "out/down_proj/b"
    }  # fmt: skip


@pytest.mark.sampled
def test_mask_has_the_structure_of_its_tree(case, method):
    base, delta = cases.transform(case, method)
    weights = lora.bind(base, delta, dropout_key=jax.random.key(0))
    for tree in (delta, weights):
        mask = lora.trainable_mask(tree)
        assert jax.tree.structure(mask) == jax.tree.structure(tree)
        assert {type(flag) for flag in jax.tree.leaves(mask)} == {bool}


def test_mask_of_bound_weights_is_a_and_b():
    base, delta = cases.transform(cases.nested(), lora.LoRA(rank=2), targets="q_proj")
    weights = lora.bind(base, delta, dropout_key=jax.random.key(0))
    flagged = names_of(weights, lora.trainable_mask(weights))
    assert flagged == {"block/q_proj/node/a", "block/q_proj/node/b"}


def test_mask_of_a_full_delta_is_everything():
    delta = cases.transform(cases.nested(), lora.Full(), targets=".*")[1]
    assert all(jax.tree.leaves(lora.trainable_mask(delta)))


def test_mask_of_an_abstract_delta():
    delta = cases.transform(cases.nested(), lora.LoRA(rank=2))[1]
    assert lora.trainable_mask(jax.eval_shape(lambda: delta)) == lora.trainable_mask(delta)


TX = {
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(1e-3), optax.adamw(1e-2)),
    "sgd": optax.sgd(1e-2, momentum=0.9),
}


def ones_like(tree):
    return jax.tree.map(jnp.ones_like, tree)


@pytest.mark.sampled
@pytest.mark.parametrize("tx", TX.values(), ids=TX)
@pytest.mark.parametrize("kind", ["delta", "combined"])
def test_only_a_and_b_move(tx, kind):
    """Even where every leaf has a gradient."""
    base, delta = cases.transform(cases.nested(), lora.LoRA(rank=2))
    tree = delta if kind == "delta" else lora.bind(base, delta)
    masked = lora.mask_optimizer(tx, tree)
    updates, _ = masked.update(ones_like(tree), masked.init(tree), tree)
    after = optax.apply_updates(tree, updates)
    changed = jax.tree.map(lambda new, old: bool(np.all(new != old)), after, tree)
    assert changed == lora.trainable_mask(tree)


@pytest.mark.parametrize("kind", ["delta", "combined"])
def test_a_clip_sees_only_what_trains(kind):
    base, delta = cases.transform(cases.nested(), lora.LoRA(rank=2))
    tree = delta if kind == "delta" else lora.bind(base, delta)
    mask = lora.trainable_mask(tree)
    small = jax.tree.map(lambda leaf, m: jnp.full_like(leaf, 1e-3 if m else 1e3), tree, mask)
    masked = lora.mask_optimizer(optax.clip_by_global_norm(1.0), tree)
    updates, _ = masked.update(small, masked.init(tree), tree)
    kept = jax.tree.map(lambda u, g, m: bool(np.all(u == (g if m else 0))), updates, small, mask)
    assert all(jax.tree.leaves(kept))


@pytest.mark.parametrize("kind", ["delta", "combined"])
def test_no_state_for_frozen_leaves(kind):
    base, delta = cases.transform(cases.nested(), lora.LoRA(rank=2))
    tree = delta if kind == "delta" else lora.bind(base, delta)
    flags = jax.tree.leaves(lora.trainable_mask(tree))
    trained = sum(leaf.size for leaf, m in zip(jax.tree.leaves(tree), flags, strict=True) if m)
    state = lora.mask_optimizer(optax.adam(1e-2), tree).init(tree)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * trained + 1  # mu, nu, count


@pytest.mark.sampled
def test_training_the_combined_tree_is_training_the_delta(case):
    base, delta = cases.transform(case, lora.LoRA(rank=2))
    delta = moved(delta)

    def train(tree, forward):
        tx = lora.mask_optimizer(TX["clipped"], tree)

        @jax.jit
        def step(tree, state):
            gradients = jax.grad(lambda t: (forward(t) ** 2).sum())(tree)
            updates, state = tx.update(gradients, state, tree)
            return optax.apply_updates(tree, updates), state

        state = tx.init(tree)
        for _ in range(3):
            tree, state = step(tree, state)
        return tree

    ours = train(delta, lambda d: case.apply(lora.bind(base, d), X))
    combined = train(lora.bind(base, delta), lambda w: case.apply(w, X))
    assert_close(combined, lora.bind(base, ours), rtol=1e-4, atol=1e-5)
    frozen = [
        leaf.base if isinstance(leaf, lora.Adapted) else leaf
        for leaf in jax.tree.leaves(combined, is_leaf=lambda x: isinstance(x, lora.Adapted))
    ]
    chex.assert_trees_all_equal(frozen, jax.tree.leaves(base))


def test_b_moves_faster_in_loraplus():
    """With weight decay, which the learning rate multiplies too."""
    delta = moved(cases.transform(cases.nested(), lora.LoRA(rank=2))[1])
    ones, faster = ones_like(delta), optax.adamw(4e-2, weight_decay=0.1)
    adamw = optax.adamw(1e-2, weight_decay=0.1)

    def updates(tx):
        return tx.update(ones, tx.init(delta), delta)[0]["block"]["q_proj"]

    plus = updates(lora.mask_optimizer(adamw, delta, b_ratio=4.0))
    chained = updates(lora.mask_optimizer(optax.chain(adamw, lora.scale_b(4.0)), delta))
    chex.assert_trees_all_equal(plus, chained)
    assert_close(plus.a, updates(lora.mask_optimizer(adamw, delta)).a)
    assert_close(plus.b, updates(lora.mask_optimizer(faster, delta)).b)
    assert not np.any(plus.scale)


def pair_of(node):
    """The factors, where a method has them among others."""
    return getattr(node, "low", node)


@pytest.mark.parametrize("kind", [lora.LoRA, lora.DoRA])
def test_projected_gradient_of_b_is_the_nearest_to_the_whole_gradient(kind):
    """Least squares over the updates `scale * a @ g`, in a node or inside one; where `a` trains,
    nothing changes."""
    rules = {"q_proj": kind(rank=2, train_a=False), "down_proj": lora.LoRA(rank=2)}
    delta = moved(cases.transform(cases.nested(), rules)[1])
    node = pair_of(delta["block"]["q_proj"])
    whole = cases.normal(9, 6, 5)
    slope = node.scale * node.a.T @ whole
    plain = jax.tree.map(lambda leaf: slope if leaf is node.b else leaf, delta)
    tx = lora.project_b()
    updates = tx.update(plain, tx.init(delta), delta)[0]
    chex.assert_trees_all_equal(updates["out"], plain["out"])
    found = pair_of(updates["block"]["q_proj"]).b
    expected = np.linalg.lstsq(np.asarray(node.scale * node.a), np.asarray(whole), rcond=None)[0]
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_nothing_to_project():
    tx = lora.project_b()
    trained = cases.transform(cases.nested(), lora.LoRA(rank=2))[1]
    frozen = cases.transform(cases.nested(), lora.LoRA(rank=2, train_a=False))[1]
    behind = lora.mask_optimizer(optax.chain(lora.project_b(), optax.sgd(1e-2)), frozen)
    for delta, update in (
        (trained, tx.update),
        (cases.transform(cases.nested(), lora.IA3())[1], tx.update),
        (frozen, lambda updates, state, _: tx.update(updates, state)),
        (frozen, behind.update),
    ):
        state = (behind if update is behind.update else tx).init(delta)
        with pytest.raises(ValueError, match="project_b found no frozen factor a in params"):
            update(delta, state, delta)


def test_extra_arguments_reach_the_optimizer():
    delta = cases.transform(cases.nested(), lora.LoRA(rank=2))[1]

    def update(updates, state, params=None, *, factor, **extra):
        del params, extra
        return jax.tree.map(lambda u: factor * u, updates), state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    masked = lora.mask_optimizer(tx, delta)
    updates, _ = masked.update(ones_like(delta), masked.init(delta), delta, factor=3.0)
    assert {float(leaf.max()) for leaf in jax.tree.leaves(updates)} == {0.0, 3.0}
