"""What holds for every method on every kind of tree."""

import dataclasses
import functools

import cases
import chex
import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import X, assert_close, assert_same_draws, moved, transform

import lora_jax as lora


def test_frozen_dicts():
    """Older Flax code keeps its variables in them."""
    case = cases.linen()
    frozen = dataclasses.replace(case, params=flax.core.freeze(case.params))
    base, delta = transform(frozen, lora.LoRA(rank=2))
    assert isinstance(base, flax.core.FrozenDict)
    assert_same_draws(delta, transform(case, lora.LoRA(rank=2))[1])
    merged = lora.merge(base, moved(delta))
    assert_close(cases.Net().apply(merged, X), case.apply(lora.bind(base, moved(delta)), X))


@functools.cache
def computed(case, method):
    """What one compiled function says of a fresh delta, and of a moved one."""
    base, delta = transform(case, method)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def values(base, delta):
        def loss(delta, base):
            output = case.apply(lora.bind(base, delta), X)
            return jnp.sin(output).sum(), output

        def merged_loss(delta):
            return jnp.sin(case.apply(lora.merge(base, delta), X)).sum()

        of_delta, of_base = jax.grad(loss, (0, 1), has_aux=True)(delta, base)[0]
        again, output = jax.grad(jax.checkpoint(loss), has_aux=True)(delta, base)
        said = {"output": output, "of_delta": of_delta, "of_base": of_base, "again": again}
        if not isinstance(method, lora.Bottleneck):
            merged = lora.merge(base, delta)
            said |= {"merged": merged, "merged_output": case.apply(merged, X)}
            said |= {
                "unmerged": lora.unmerge(merged, delta),
                "of_merged": jax.grad(merged_loss)(delta),
            }
        return said

    return jax.device_get((values(base, delta), values(base, moved(delta))))


@pytest.mark.sampled
def test_fresh_adapter_is_the_identity(case, method):
    fresh, _ = computed(case, method)
    assert_close(fresh["output"], case.apply(case.params, X), atol=1e-6)


@pytest.mark.sampled
def test_fresh_adapter_merges_into_the_same_params(case, mergeable):
    base, delta = transform(case, mergeable)
    chex.assert_trees_all_equal(lora.merge(base, delta), case.params)


def test_base_is_the_params_tree(case, method):
    base, _ = transform(case, method)
    chex.assert_trees_all_equal(base, case.params)


@pytest.mark.sampled
def test_moved_adapter_is_not_the_identity(case, method):
    _, trained = computed(case, method)
    assert np.abs(trained["output"] - np.asarray(case.apply(case.params, X))).max() > 1e-2


def test_merged_equals_bound(case, mergeable):
    _, trained = computed(case, mergeable)
    chex.assert_trees_all_equal_structs(trained["merged"], case.params)
    assert_close(trained["merged_output"], trained["output"], atol=5e-6)


def test_unmerge_inverts_merge(case, mergeable):
    _, trained = computed(case, mergeable)
    assert_close(trained["unmerged"], case.params, atol=1e-6)


def test_base_gets_no_gradient(case, method):
    _, trained = computed(case, method)
    assert not any(map(np.any, jax.tree.leaves(trained["of_base"])))


def test_only_trained_leaves_get_a_gradient(case, method):
    _, trained = computed(case, method)
    received = jax.tree.map(lambda gradient: bool(np.any(gradient)), trained["of_delta"])
    assert received == lora.trainable_mask(transform(case, method)[1])


def test_gradient_is_that_of_the_merged_model(case, mergeable):
    _, trained = computed(case, mergeable)
    mask = lora.trainable_mask(transform(case, mergeable)[1])
    both = trained["of_delta"], trained["of_merged"]
    for trains, one, other in zip(*map(jax.tree.leaves, (mask, *both)), strict=True):
        if trains:
            assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.sampled
def test_init_is_the_same_under_jit(case, method):
    eager = transform(case, method)[1]
    jitted = jax.jit(lambda p: lora.lora_transform(p, method, key=jax.random.key(0))[1])
    assert_same_draws(jitted(case.params), eager)


def test_eval_shape(case, method):
    base, delta = transform(case, method)
    shapes = jax.eval_shape(lambda p: lora.lora_transform(p, method, key=jax.random.key(0)),
                            case.params)  # fmt: skip
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, (base, delta))


@pytest.mark.sampled
def test_jit_agrees(case, method):
    base, delta = transform(case, method)
    _, trained = computed(case, method)
    assert_close(trained["output"], case.apply(lora.bind(base, moved(delta)), X), atol=5e-6)


@pytest.mark.sampled
def test_vmap_over_deltas(case, method):
    base, delta = transform(case, method)
    deltas = [delta, moved(delta, 1), moved(delta, 2)]
    outputs = jax.vmap(lambda d: case.apply(lora.bind(base, d), X))(lora.stack(deltas))
    for output, member in zip(outputs, deltas, strict=True):
        assert_close(output, case.apply(lora.bind(base, member), X), atol=5e-6)


def test_remat_changes_nothing(case, method):
    _, trained = computed(case, method)
    assert_close(trained["again"], trained["of_delta"], atol=5e-6)


@pytest.mark.parametrize("name", ["lora_variant", "full"])
def test_pmap(name):
    case, method = cases.stacked(), cases.METHODS[name]
    base, delta = transform(case, method)
    delta, count = moved(delta), jax.local_device_count()
    assert count > 1
    x = jnp.stack([X * i for i in range(count)])
    outputs = jax.pmap(
        lambda base, delta, x: case.apply(lora.bind(base, delta), x), in_axes=(None, None, 0)
    )(base, delta, x)
    expected = jnp.stack([case.apply(lora.bind(base, delta), row) for row in x])
    assert_close(np.asarray(outputs), np.asarray(expected), atol=5e-6)


@pytest.mark.sampled
def test_delta_passes_through_a_scan_over_steps(case, method):
    base, delta = transform(case, method)

    def step(delta, x):
        loss, gradients = jax.value_and_grad(
            lambda d: (case.apply(lora.bind(base, d), x) ** 2).mean()
        )(delta)
        return jax.tree.map(lambda d, g: d - 0.01 * g, delta, gradients), loss

    _, losses = jax.lax.scan(step, moved(delta), jnp.stack([X] * 5))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["lora", "lora_variant"])
def test_adding_a_target_changes_no_other_numbers(name):
    case, method = cases.nested(), cases.METHODS[name]
    few = transform(case, method, targets="q_proj")[1]
    many = transform(case, method, targets=["down_proj", "q_proj"])[1]
    assert_same_draws(few["block"]["q_proj"], many["block"]["q_proj"])
    assert "out" not in few


@pytest.mark.parametrize("name", ["lora", "lora_variant"])
def test_stacked_layers_draw_what_unstacked_ones_draw(name):
    method, key = cases.METHODS[name], jax.random.key(5)
    stacked = lora.lora_transform({"layers": {"q_proj": jnp.ones((4, 6, 5))}}, method, key=key)[1]
    flat = lora.lora_transform(
        {"layers": [{"q_proj": jnp.ones((6, 5))} for _ in range(4)]}, method, key=key
    )[1]
    for i in range(4):
        layer = jax.tree.map(lambda leaf: leaf[i], stacked["layers"]["q_proj"])  # noqa: B023
        assert_same_draws(layer, flat["layers"][str(i)]["q_proj"])


def test_layers_and_paths_draw_different_numbers():
    params = {"layers": {"q_proj": jnp.ones((2, 6, 6)), "k_proj": jnp.ones((2, 6, 6))}}
    delta = lora.lora_transform(params, lora.LoRA(rank=2), key=jax.random.key(0))[1]
    draws = jnp.concatenate([node.a for node in delta["layers"].values()])
    for i in range(4):
        for j in range(i):
            assert np.abs(draws[i] - draws[j]).max() > 1e-3


def test_another_key_draws_other_numbers():
    case = cases.nested()
    one, two = (
        lora.lora_transform(case.params, lora.LoRA(rank=2), key=jax.random.key(seed))[1]
        for seed in (0, 1)
    )
    assert np.abs(one["block"]["q_proj"].a - two["block"]["q_proj"].a).max() > 1e-3


@pytest.mark.sampled
def test_float32_deltas_over_a_bf16_base(case, method):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), case.params)
    base, delta = lora.lora_transform(params, method, key=jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(delta)} == {jnp.dtype("float32")}
    x = X.astype(jnp.bfloat16)
    output = case.apply(lora.bind(base, delta), x)
    assert output.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(output, case.apply(params, x))


@pytest.mark.sampled
def test_merging_keeps_the_dtype(case, mergeable):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), case.params)
    merged = lora.merge(*lora.lora_transform(params, mergeable, key=jax.random.key(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}


def test_bf16_merge_rounds_once():
    params = {"q_proj": jnp.full((4, 4), 1.0, jnp.bfloat16)}
    base, delta = lora.lora_transform(params, lora.Full(), key=jax.random.key(0))
    delta["q_proj"] = delta["q_proj"].replace(delta=jnp.full((4, 4), 2.0**-8 + 2.0**-12))
    # In bf16 the update alone rounds to 2^-8, and 1 + 2^-8 then ties to even: 1.
    np.testing.assert_array_equal(lora.merge(base, delta)["q_proj"], jnp.bfloat16(1 + 2**-7))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(x, x)


def attention_params():
    x = cases.normal(0, 2, 5, 6)
    params = Attention().init(jax.random.key(1), x)
    root = "params/MultiHeadDotProductAttention_0"
    into, out = (
        lora.Layout(contracted=(-3,), output=(-2, -1)),
        lora.Layout(contracted=(-3, -2), output=(-1,)),
    )
    layouts = {f"{root}/{name}/kernel": into for name in ("query", "key", "value")}
    return params, layouts | {f"{root}/out/kernel": out}, x


def test_layouts_make_one_matrix_of_a_flax_attention_kernel():
    params, layouts, x = attention_params()
    base, delta = lora.lora_transform(
        params, lora.LoRA(rank=2), key=jax.random.key(0), layouts=layouts
    )
    merged = lora.merge(base, moved(delta))
    for path, layout in layouts.items():
        before, after = params, merged
        for part in path.split("/"):
            before, after = before[part], after[part]
        rows = np.prod(before.shape[: len(layout.contracted)])
        update = np.asarray(after - before).reshape(rows, -1)
        assert np.linalg.matrix_rank(update, tol=1e-4) == 2
    assert Attention().apply(merged, x).shape == x.shape
    assert_close(lora.unmerge(merged, moved(delta)), params)


def test_layout_of_a_kernel_with_two_output_axes():
    """The update, entry by entry, from its definition."""
    params, layouts, _ = attention_params()
    base, delta = lora.lora_transform(
        params, lora.LoRA(rank=2, alpha=6.0), key=jax.random.key(0), layouts=layouts
    )
    delta = moved(delta)
    name = "MultiHeadDotProductAttention_0"
    node = delta["params"][name]["query"]["kernel"]
    assert node.a.shape == (6, 2) and node.b.shape == (2, 2, 4)
    update = lora.merge(base, delta)["params"][name]["query"]["kernel"]
    update = update - params["params"][name]["query"]["kernel"]
    assert_close(update, 3 * jnp.einsum("dr,rnh->dnh", node.a, node.b), atol=1e-5)
    node = delta["params"][name]["out"]["kernel"]
    assert node.a.shape == (2, 4, 2) and node.b.shape == (2, 6)


def test_expert_kernels_draw_and_merge_expert_by_expert():
    params = {"experts": {"up_proj": cases.normal(0, 3, 2, 6, 5)}}
    base, delta = lora.lora_transform(params, lora.LoRA(rank=2), key=jax.random.key(0))
    delta = moved(delta)
    node = delta["experts"]["up_proj"]
    assert node.a.shape == (3, 2, 6, 2) and node.scale.shape == (3, 2)
    one = jax.tree.map(lambda leaf: leaf[1, 0], node)
    merged = lora.merge(base, delta)["experts"]["up_proj"]
    assert_close(merged[1, 0], one.merge(params["experts"]["up_proj"][1, 0]))


def test_mapping_first_match_wins_and_none_excludes():
    params = {"layers": {n: jnp.ones((2, 6, 6)) for n in ("q_proj", "k_proj", "v_proj", "up_proj")}}
    rules = {"v_proj": None, "q_proj": lora.LoRA(rank=3), "attention": lora.LoRA(rank=1),
             "all-linear": lora.Full()}  # fmt: skip
    delta = lora.lora_transform(params, rules, key=jax.random.key(0))[1]["layers"]
    assert set(delta) == {"q_proj", "k_proj", "up_proj"}
    assert delta["q_proj"].rank == 3 and delta["k_proj"].rank == 1
    assert delta["up_proj"].delta.shape == (2, 6, 6)


def test_mapping_of_one_method_is_that_method(case):
    method = lora.LoRA(rank=2)
    assert_same_draws(transform(case, {"all-linear": method}), transform(case, method))


def bad(params, method, match, **kwargs):
    with pytest.raises(ValueError, match=match):
        lora.lora_transform(params, method, key=jax.random.key(0), **kwargs)


TREE = {"attn": {"q_proj": np.ones((6, 5), np.float32)}, "codes": np.ones((4, 4), np.int32)}


def test_integer_leaf():
    bad(TREE, lora.LoRA(rank=2), "codes holds int32.*Leave it out", targets="codes")


@pytest.mark.parametrize("method", ["LoRA", 8, lora.LoRA, object()])
def test_something_that_is_no_method(method):
    bad(TREE, method, "expected a method such as", targets="q_proj")


def test_rank_above_the_smaller_side():
    bad(TREE, lora.LoRA(rank=6), "attn/q_proj: .*rank=6.* 6 x 5 matrix", targets="q_proj")


def test_layout_of_an_unknown_path():
    bad(TREE, lora.LoRA(rank=2), "layouts names 'attn/q_prj'.*attn/q_proj", targets="q_proj",
        layouts={"attn/q_prj": lora.Layout()})  # fmt: skip


def test_layout_that_does_not_fit():
    bad(TREE, lora.LoRA(rank=2), "attn/q_proj: .*does not fit shape", targets="q_proj",
        layouts={"attn/q_proj": lora.Layout(contracted=(-3,), output=(-2, -1))})  # fmt: skip


@pytest.mark.parametrize("call", [lora.bind, lora.merge, lora.unmerge])
def test_tree_without_an_adapted_path(call):
    base, delta = transform(cases.nested(), lora.LoRA(rank=2))
    renamed = {"block": {"wq": base["block"]["q_proj"]}, "out": base["out"]}
    with pytest.raises(ValueError, match="adapts 'block/q_proj', which the tree does not have"):
        call(renamed, delta)


def test_a_quantised_weight_is_not_unmerged():
    params = {"q_proj": jnp.ones((8, 4))}
    base, delta = lora.lora_transform(params, lora.LoRA(rank=2), key=jax.random.key(0))
    merged = lora.quantize(lora.merge(base, delta), "nf4", block_size=8)
    with pytest.raises(ValueError, match="q_proj: NF4 cannot be unmerged: .* Keep the base, or"):
        lora.unmerge(merged, delta)


@pytest.mark.parametrize("method", [lora.LoRA(rank=2), lora.Full()], ids=["LoRA", "Full"])
@pytest.mark.parametrize("call", [lora.bind, lora.merge, lora.unmerge])
def test_tree_whose_shapes_changed(call, method):
    base, delta = transform(cases.nested(), method)
    base["block"]["q_proj"] = jnp.ones((7, 5))
    message = r"block/q_proj: .*shape \(6, 5\), the base has \(7, 5\)"
    with pytest.raises(ValueError, match=message):
        call(base, delta)


def test_other_base_under_adapter_ids():
    base, delta = transform(cases.nested(), lora.LoRA(rank=2))
    base["block"]["q_proj"] = jnp.ones((7, 5))
    with pytest.raises(ValueError, match=r"block/q_proj: .*\(6, 5\), the base has \(7, 5\)"):
        lora.bind(base, lora.stack([delta, delta]), adapter_ids=jnp.array([0, 1, 0]))


@pytest.mark.parametrize("call", [lora.bind, lora.merge, lora.describe])
def test_delta_with_a_leaf_that_is_no_node(call):
    base, delta = transform(cases.nested(), lora.LoRA(rank=2))
    delta["block"]["note"] = jnp.ones(3)
    with pytest.raises(ValueError, match="block/note: expected a delta node, found"):
        call(base, delta)


def test_full_with_adapter_ids():
    base, delta = transform(cases.nested(), lora.Full())
    with pytest.raises(ValueError, match="Full deltas cannot be chosen by row"):
        lora.bind(base, lora.stack([delta, delta]), adapter_ids=jnp.array([0, 1, 0]))
