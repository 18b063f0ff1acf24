"""Methods of every kind in the scanned Llama, which knows none of them."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, moved

import lora_jax as lora
from lora_jax.models import llama

CONFIG, PARAMS, TOKENS = cases.llama_case()
FORWARD = jax.jit(llama.forward, static_argnums=2)
KEY = jax.random.key(0)


def transform(method, params=PARAMS, targets=("q_proj", "down_proj")):
    return jax.jit(lambda p: lora.lora_transform(p, method, key=KEY, targets=targets))(params)


def run(delta, base=PARAMS, **kwargs):
    return FORWARD(lora.bind(base, delta, **kwargs), TOKENS, CONFIG)


METHODS = {
    "dora": lora.DoRA(rank=2, alpha=2.0),
    "vera": lora.VeRA(rank=4),
    "ia3": lora.IA3(),
    "bottleneck": lora.Bottleneck(size=2),
    "adalora": lora.AdaLoRA(rank=3, target_rank=1, total_steps=4, alpha=6.0),
}
MERGEABLE = [name for name in METHODS if name != "bottleneck"]


@pytest.fixture(scope="module", params=METHODS)
def made(request):
    """A delta, fresh and moved, over the scanned Llama."""
    delta = transform(METHODS[request.param])[1]
    return delta, moved(delta, size=0.5)


@pytest.fixture(scope="module")
def logits():
    return FORWARD(PARAMS, TOKENS, CONFIG)


@pytest.mark.sampled
def test_a_fresh_method_is_the_identity_in_the_scanned_llama(made, logits):
    assert_close(run(made[0]), logits, rtol=1e-4, atol=1e-5)
    assert np.abs(run(made[1]) - logits).max() > 1e-2


@pytest.mark.sampled
def test_only_what_trains_gets_a_gradient(made):
    gradients = jax.jit(jax.grad(lambda d: (run(d) ** 2).mean()))(made[1])
    received = jax.tree.map(lambda g: bool(np.any(g)), gradients)
    assert received == lora.trainable_mask(made[1])


def test_mask_of_bound_weights(made):
    weights = lora.bind(PARAMS, made[0])
    mask = lora.trainable_mask(weights)
    assert jax.tree.structure(mask) == jax.tree.structure(weights)
    count = [sum(jax.tree.leaves(m)) for m in (mask, lora.trainable_mask(made[0]))]
    assert count[0] == count[1] > 0


@pytest.mark.sampled
def test_stacks_through_vmap(made):
    outputs = jax.jit(jax.vmap(run))(lora.stack(made))
    for output, delta in zip(outputs, made, strict=True):
        assert_close(output, run(delta), rtol=1e-3, atol=2e-5)


@pytest.mark.sampled
def test_rows_use_their_own_adapter(made):
    other = moved(made[0], seed=2, size=0.5)
    together = run(lora.stack([made[1], other]), adapter_ids=jnp.array([1, 0]))
    expected = jnp.stack([run(other)[0], run(made[1])[1]])
    assert_close(together, expected, rtol=1e-3, atol=2e-5)


def test_described(made):
    found = lora.describe(PARAMS, made[0])
    assert found.trainable_params > 0 and "trainable params" in str(found)


@pytest.mark.parametrize("name", MERGEABLE)
def test_merged_equals_bound(name):
    delta = moved(transform(METHODS[name])[1])
    merged = lora.merge(PARAMS, delta)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, PARAMS)
    assert_close(FORWARD(merged, TOKENS, CONFIG), run(delta), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", ["dora", pytest.param("vera", marks=pytest.mark.slow)])
def test_remat_changes_no_gradient(name):
    delta = moved(transform(METHODS[name])[1])

    def loss(delta, remat):
        weights = lora.bind(PARAMS, delta)
        return (llama.forward(weights, TOKENS, CONFIG, remat=remat) ** 2).mean()

    plain, again = (jax.jit(jax.grad(loss), static_argnums=1)(delta, r) for r in ("none", "full"))
    assert_close(again, plain, rtol=1e-3, atol=2e-5)


MIXED = {
    "layers/mlp/gate_proj": None,
    "attention": lora.DoRA(rank=2, alpha=2.0),
    "mlp": lora.LoRA(rank=3),
    "embed": lora.Prompt(length=2),
    "lm_head": lora.IA3(),
}


@pytest.mark.slow
def test_mixed_methods_in_one_model():
    delta = moved(jax.jit(lambda p: lora.lora_transform(p, MIXED, key=KEY)[1])(PARAMS))
    found = lora.describe(PARAMS, delta, MIXED)
    kinds = {row.path: (row.rule, row.kind, row.rank) for row in found.rows}
    assert "layers/mlp/gate_proj" not in kinds and len(kinds) == 8
    assert kinds["layers/attn/o_proj"] == ("attention", "DoRANode", 2)
    assert kinds["layers/mlp/up_proj"] == ("mlp", "LoRANode", 3)
    assert kinds["lm_head"] == ("lm_head", "IA3Node", None)
    assert kinds["prompt"] == ("", "PromptNode", None)
    merged = lora.merge(PARAMS, {name: node for name, node in delta.items() if name != "prompt"})
    with_prompt = merged | {"prompt": delta["prompt"]}
    assert_close(FORWARD(with_prompt, TOKENS, CONFIG), run(delta), rtol=1e-3, atol=2e-5)


def test_methods_without_a_neutral_value_say_so():
    one, both = (
        transform(METHODS["adalora"], targets=t)[1] for t in ("q_proj", ["q_proj", "down_proj"])
    )
    with pytest.raises(ValueError, match="AdaLoRANode has no neutral value"):
        lora.stack([one, both])


def test_a_method_that_cannot_adapt_a_table_says_so():
    tied, params, _ = cases.llama_case(tie_embeddings=True)
    delta = transform(lora.IA3(), params, targets="embed")[1]
    with pytest.raises(ValueError, match="IA3Node cannot adapt a tied embedding"):
        llama.output_head(lora.bind(params, delta))


DROPPING = {
    "lora": lora.LoRA(rank=3, dropout=0.5),
    "pissa": lora.LoRA(rank=3, dropout=0.5, init="pissa"),
    "dora": lora.DoRA(rank=3, dropout=0.5),
    "vera": lora.VeRA(rank=3, dropout=0.5),
    "adalora": lora.AdaLoRA(rank=3, target_rank=1, total_steps=4, dropout=0.5),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", DROPPING)
def test_each_row_has_a_dropout_mask_of_its_own(name):
    """As often as if it were bound alone: by mean and deviation over many rows of one input."""
    params, count = {"w": cases.normal(0, 6, 5)}, 4000
    fresh = transform(DROPPING[name], params, targets="w")[1]
    deltas = [moved(fresh, seed, size=0.5) for seed in (1, 2)]
    x = jnp.broadcast_to(cases.normal(1, 6), (count, 6))
    ids = jnp.arange(count) % 2

    @jax.jit
    def rows(key):
        bound = functools.partial(lora.bind, params, lora.stack(deltas))
        weights = bound(adapter_ids=ids, dropout_key=key), bound(adapter_ids=ids)
        alone = [lora.linear(x, lora.bind(params, d, dropout_key=key)["w"]) for d in deltas]
        plain = [lora.linear(x[0], lora.bind(params, d)["w"]) for d in deltas]
        return *(lora.linear(x, tree["w"]) for tree in weights), alone, plain

    together, without, alone, plain = rows(jax.random.key(3))
    for i in range(2):
        ours, theirs = np.asarray(together[i::2]), np.asarray(alone[i])
        assert len(np.unique(ours.round(4), axis=0)) > 10  # not one mask for all
        error = theirs.std(axis=0) * np.sqrt(1 / len(ours) + 1 / len(theirs))
        assert np.all(np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 5 * error)
        np.testing.assert_allclose(ours.std(axis=0), theirs.std(axis=0), rtol=0.1)
        assert_close(without[i], plain[i], rtol=1e-4, atol=1e-5)
