"""Adapters that start from the weight: PiSSA, OLoRA, LoftQ, and the way back to a plain one."""

import functools

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, moved
from test_protocol_weights import Int8, quantized

import lora_jax as lora
from lora_jax.methods import LoRANode

STARTS = ["pissa", "pissa_niter_4", "olora"]
PARAMS = {"layers": {"q_proj": cases.normal(0, 2, 16, 9)}, "out": cases.normal(1, 9, 7)}
X = cases.normal(2, 4, 9)
TARGETS = ("q_proj", "out")
KEY = jax.random.key(0)


def made(init, params=PARAMS, **kwargs):
    kwargs = {"rank": 3, "alpha": 6.0} | kwargs
    method = lora.LoRA(init=init, **kwargs)
    return jax.jit(lambda p: lora.lora_transform(p, method, targets=TARGETS, key=KEY))(params)


QUANTISED = {"layers": lora.quantize(PARAMS["layers"], "nf4", block_size=8), "out": PARAMS["out"]}


def outputs(weights):
    x = cases.normal(5, 4, 16)
    hidden = jax.vmap(lora.linear, (None, 0))(x, weights["layers"]["q_proj"])
    return hidden, lora.linear(hidden[0], weights["out"])


@pytest.mark.optimized
@pytest.mark.parametrize("init", STARTS)
def test_a_start_changes_nothing_to_the_last_bit(init):
    """Neither the base nor what a model computes, bound or merged, over four bits too."""
    for params in (PARAMS, QUANTISED):
        base, delta = made(init, params)
        chex.assert_trees_all_equal(base, params)
        assert np.abs(delta["out"].a @ delta["out"].b).max() > 0.1

        @jax.jit
        def everything(base, delta):
            slope = jax.grad(lambda d: (outputs(lora.bind(base, d))[0] ** 2).sum())
            merged = lora.merge(base, delta)
            return outputs(lora.bind(base, delta)), outputs(base), merged, slope(delta)

        bound, plain, merged, slope = everything(base, delta)
        chex.assert_trees_all_equal(bound, plain)
        chex.assert_trees_all_equal(merged, lora.dequantize(params))
        moving = jax.tree.map(lambda leaf: bool(np.any(leaf)), slope["layers"]["q_proj"])
        assert moving == delta["layers"]["q_proj"].trainable()


def test_what_it_started_from_costs_no_gradient():
    """In the program of a gradient are its two products forward, and none back."""

    def products(delta):
        loss = lambda d: lora.linear(X, lora.bind(PARAMS, d)["out"]).sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(delta)).count("dot_general")

    assert products(made("pissa")[1]) == products(made("kaiming")[1]) + 2


def test_a_step_may_consume_it():
    _, delta = lora.lora_transform(PARAMS, lora.LoRA(rank=2, init="pissa"), targets="out", key=KEY)
    step = jax.jit(lambda d: jax.tree.map(lambda leaf: leaf + 1, d), donate_argnums=0)
    assert np.all(np.isfinite(step(delta)["out"].a0))


def test_pissa_takes_the_leading_triplets():
    delta = made("pissa")[1]
    for matrix, node in ((PARAMS["layers"]["q_proj"][1],
                          jax.tree.map(lambda x: x[1], delta["layers"]["q_proj"])),
                         (PARAMS["out"], delta["out"])):  # fmt: skip
        u, s, vt = np.linalg.svd(np.asarray(matrix), full_matrices=False)
        assert_close(2 * node.a @ node.b, u[:, :3] * s[:3] @ vt[:3], rtol=1e-4, atol=1e-5)
        assert_close(jnp.linalg.norm(node.a, axis=0), np.sqrt(s[:3] / 2), rtol=1e-4)
        assert_close(jnp.linalg.norm(node.b, axis=1), np.sqrt(s[:3] / 2), rtol=1e-4)
        chex.assert_trees_all_equal((node.a0, node.b0), (node.a, node.b))


def test_fast_pissa_comes_close():
    """To the smallest rest that any factors of the rank leave."""
    exact, fast = (
        np.linalg.norm(PARAMS["out"] - 2 * node.a @ node.b)
        for node in (made(init)[1]["out"] for init in ("pissa", "pissa_niter_4"))
    )
    assert 1 <= fast / exact < 1.01


def test_olora_takes_leading_rows_and_columns_of_qr():
    delta = made("olora")[1]
    q, r = np.linalg.qr(np.asarray(PARAMS["out"]).T)
    assert_close(delta["out"].a, r[:3].T, rtol=1e-4, atol=1e-5)
    assert_close(delta["out"].b, q[:, :3].T, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_trained_one_in_every_form():
    """Bound, merged, looked up, transposed, merged back, plain, and in arithmetic."""
    base, start = made("pissa")
    trained = moved(start)
    node = trained["out"]
    whole = PARAMS["out"] + 2 * (node.a @ node.b - node.a0 @ node.b0)
    weight, merged = lora.bind(base, trained)["out"], lora.merge(base, trained)
    assert_close(merged["out"], whole, atol=5e-6)
    assert_close(lora.linear(X, weight), X @ whole, atol=5e-6)
    assert_close(lora.embed(jnp.array([3, 0]), weight), whole[jnp.array([3, 0])], atol=5e-6)
    assert_close(lora.linear(X @ whole, weight.T), X @ whole @ whole.T, atol=5e-6)
    assert_close(lora.unmerge(merged, trained), base, atol=5e-6)
    plain = lora.as_plain_lora(trained)
    assert plain["out"].rank == 6 and plain["out"].a0 is None
    assert_close(lora.merge(base, plain), merged, atol=5e-6)
    for how in ({}, {"how": "svd", "rank": 6}):
        half = lora.combine([trained, trained], [0.25, 0.75], **how)
        assert_close(lora.merge(base, half), merged, rtol=1e-4, atol=1e-5)
    again = lora.extract(base, merged, lora.LoRA(rank=6, init="pissa"), targets=TARGETS)
    assert_close(lora.merge(base, again), merged, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_arms_of_any_init_share_a_base_and_a_stack():
    """Padding is exact here too, throughout training."""
    inits = ("kaiming", "pissa", "olora")
    fresh = [made(init, rank=rank)[1] for init, rank in zip(inits, (4, 2, 3), strict=True)]
    deltas = [moved(delta, i) for i, delta in enumerate(fresh)]
    del deltas[2]["out"]
    stacked = lora.stack(deltas)
    for back, delta in zip(lora.unstack(stacked, like=deltas), deltas, strict=True):
        chex.assert_trees_all_equal(back, delta)

    def loss(delta):
        return jnp.sin(outputs(lora.bind(PARAMS, delta))[0]).sum()

    slopes = jax.jit(jax.vmap(jax.grad(loss)))(stacked)
    for slope, delta in zip(lora.unstack(slopes, like=deltas), deltas, strict=True):
        assert_close(slope, jax.grad(loss)(delta), rtol=1e-4, atol=1e-5)
    pad = lora.unstack(slopes)[1]["layers"]["q_proj"]
    assert not np.any(pad.a[..., 2:]) and not np.any(pad.b[..., 2:, :])
    rows = lora.bind(PARAMS, stacked, adapter_ids=jnp.array([1, 0, 2]))["out"]
    alone = [lora.linear(X[i], lora.bind(PARAMS, d)["out"]) for i, d in enumerate(
             (deltas[1], deltas[0], {}))]  # fmt: skip
    assert_close(lora.linear(X[:3], rows), jnp.stack(alone), atol=5e-6)
    start = jax.vmap(lambda d: lora.merge(PARAMS, d))(lora.stack(fresh))
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[1], start), PARAMS)


def test_the_sharding_of_what_it_started_from():
    delta = made("pissa")[1]
    spec = jax.sharding.PartitionSpec(None, "x", "y")
    one = delta["layers"]["q_proj"]
    for node in (one.sharding_specs(spec), one.local_specs(spec)):
        assert (node.a0, node.b0) == (node.a, node.b) == (
            jax.sharding.PartitionSpec(None, "x", None), jax.sharding.PartitionSpec(None, None, "y")
        )  # fmt: skip


def test_ranks_of_their_own_for_each_layer():
    method = {"q_proj": lora.LoRA(init="pissa", rank=(2, 0))}
    base, delta = lora.lora_transform(PARAMS, method, key=KEY)
    node = delta["layers"]["q_proj"]
    chex.assert_trees_all_equal(lora.merge(base, delta), PARAMS)
    assert np.linalg.matrix_rank(node.a @ node.b).tolist() == [2, 0]


def test_more_axes():
    params = {"kernel": PARAMS["layers"]["q_proj"][0].reshape(16, 3, 3)}
    layouts = {"kernel": lora.Layout(contracted=(-3,), output=(-2, -1))}
    base, delta = lora.lora_transform(params, lora.LoRA(init="pissa", rank=3), key=KEY,
                                      layouts=layouts)  # fmt: skip
    assert delta["kernel"].b.shape == delta["kernel"].b0.shape == (3, 3, 3)
    chex.assert_trees_all_equal(lora.merge(base, delta), params)
    trained = moved(delta)
    plain = lora.as_plain_lora(trained)
    assert_close(lora.merge(base, plain), lora.merge(base, trained), atol=5e-6)


def test_a_format_that_cannot_be_quantised_again_will_do():
    base = {"layers": {"q_proj": quantized(PARAMS["layers"]["q_proj"])}, "out": PARAMS["out"]}
    chex.assert_trees_all_equal(made("pissa", base)[0], base)


def coarse(leaf):
    """Int8 in name, with five levels."""
    scale = jnp.abs(leaf).max(axis=-2, keepdims=True) / 2
    return Coarse(jnp.round(leaf / scale).astype(jnp.int8), scale)


class Coarse(Int8):
    def requantized(self, dense):
        return coarse(dense)


jax.tree_util.register_dataclass(Coarse, ["codes", "scale"], [])


def test_loftq_approaches_the_original_weights():
    params = {"layers": {"q_proj": cases.normal(0, 2, 12, 9)}, "out": PARAMS["out"]}
    base = {"layers": {"q_proj": coarse(params["layers"]["q_proj"])}, "out": params["out"]}
    _, delta = made("kaiming", base)

    def error(base, delta):
        return float(jnp.linalg.norm((lora.merge(base, delta)["layers"]["q_proj"]
                                      - params["layers"]["q_proj"]).reshape(-1)))  # fmt: skip

    errors = [error(base, delta)]
    for iterations in (1, 2, 5):
        found = lora.loftq_start(params, base, delta, iterations=iterations)
        assert isinstance(found[0]["layers"]["q_proj"], Coarse)
        chex.assert_trees_all_equal(found[1]["out"], delta["out"])  # its base is an array
        errors.append(error(*found))
    # What is left of the error of quantisation is best among all deltas of the rank.
    rest = np.asarray(params["layers"]["q_proj"] - base["layers"]["q_proj"].dense())
    singular = np.linalg.svd(rest, compute_uv=False)
    assert np.isclose(errors[1], np.sqrt((singular[:, 3:] ** 2).sum()), rtol=1e-4)
    assert errors[0] > errors[1] > errors[2] > errors[3]


def test_loftq_wants_the_original_of_every_adapted_weight():
    base = {"layers": {"q_proj": coarse(PARAMS["layers"]["q_proj"])}, "out": PARAMS["out"]}
    _, delta = made("kaiming", base)
    with pytest.raises(ValueError, match="layers/q_proj: the delta .* have it not at all"):
        lora.loftq_start({"out": PARAMS["out"]}, base, delta)


def test_other_nodes_pass_through():
    base, delta = lora.lora_transform(PARAMS, lora.Full(), targets="out", key=KEY)
    assert lora.as_plain_lora(delta)["out"] is delta["out"]
    assert lora.loftq_start(PARAMS, base, delta)[1]["out"] is delta["out"]
    assert lora.eva_start(delta, {})["out"] is delta["out"]
    assert not isinstance(delta["out"], LoRANode)


def test_dora_keeps_its_base():
    with pytest.raises(ValueError, match=r"DoRA\(init='pissa'\): expected one of"):
        lora.DoRA(init="pissa")


RANKS = (3, 0, 1)
DEEP = {"layers": {"q_proj": cases.normal(0, 3, 16, 9)}}


@pytest.mark.slow
@pytest.mark.parametrize("start", ["loftq", "eva"])
def test_starts_keep_each_layers_rank(start):
    """As if each layer stood alone with an adapter of its rank; rank 0 adapts nothing."""
    base = lora.quantize(DEEP, "int4", block_size=8)

    @functools.partial(jax.jit, static_argnums=2)
    def started(params, base, rank):
        delta = lora.lora_transform(base, lora.LoRA(rank=rank), key=KEY)[1]
        if start == "loftq":
            return lora.loftq_start(params, base, delta, iterations=2)
        covariances = {"layers/q_proj": jax.vmap(lambda w: w @ w.T)(params["layers"]["q_proj"])}
        return base, lora.eva_start(delta, covariances)

    base, delta = started(DEEP, base, RANKS)
    node = delta["layers"]["q_proj"]
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(delta))
    merged = lora.merge(base, delta)["layers"]["q_proj"]
    for layer, rank in enumerate(RANKS):
        assert np.count_nonzero(np.any(node.a[layer], axis=0)) == rank
        assert not np.any(node.b[layer, rank:])
        if rank:
            one = jax.tree.map(lambda leaf: leaf[layer : layer + 1], DEEP)  # noqa: B023
            alone = started(one, lora.quantize(one, "int4", block_size=8), rank)
            assert_close(merged[layer], lora.merge(*alone)["layers"]["q_proj"][0], atol=1e-5)
        else:
            chex.assert_trees_all_equal(
                merged[layer], lora.dequantize(base)["layers"]["q_proj"][layer]
            )


def test_eva_of_more_axes():
    params = {"kernel": cases.normal(0, 4, 3, 5)}
    layouts = {"kernel": lora.Layout(contracted=(-3, -2), output=(-1,))}
    delta = lora.lora_transform(params, lora.LoRA(rank=2), key=KEY, layouts=layouts)[1]
    inputs = cases.normal(1, 40, 12)
    found = lora.eva_start(delta, {"kernel": inputs.T @ inputs})["kernel"].a
    _, _, vt = np.linalg.svd(np.asarray(inputs), full_matrices=False)
    assert_close(jnp.abs(found.reshape(12, 2)), np.abs(vt[:2].T), rtol=1e-3, atol=1e-4)


STARTED_TWICE = {
    "eva": lambda p, b, d: lora.eva_start(d, {}),
    "loftq": lambda p, b, d: lora.loftq_start(p, b, d),
}


@pytest.mark.parametrize("name", STARTED_TWICE)
def test_two_starts_are_one_too_many(name):
    _, delta = made("pissa", QUANTISED)
    with pytest.raises(ValueError, match=f"layers/q_proj: {name}_start chooses factors of its own"):
        STARTED_TWICE[name](PARAMS, QUANTISED, delta)


def test_wrong_arguments():
    _, delta = made("kaiming", QUANTISED)
    with pytest.raises(ValueError, match="iterations=0"):
        lora.loftq_start(PARAMS, QUANTISED, delta, iterations=0)
    other = {"layers": {"q_proj": PARAMS["layers"]["q_proj"][:, :8]}, "out": PARAMS["out"]}
    with pytest.raises(ValueError, match=r"layers/q_proj: .*\(2, 16, 9\).* as \(2, 8, 9\)"):
        lora.loftq_start(other, QUANTISED, delta)
    with pytest.raises(ValueError, match=r"layers/q_proj: the covariance .*expected \(2, 16, 16\)"):
        lora.eva_start(delta, {"layers/q_proj": jnp.ones((16, 16))})


@pytest.mark.slow
def test_a_base_of_its_own_is_not_forgotten():
    """Through everything that makes a delta of deltas."""
    _, delta = made("kaiming", QUANTISED)
    _, owned = lora.loftq_start(PARAMS, QUANTISED, delta)
    ways = {
        "plain": lora.as_plain_lora(owned),
        "stack": lora.stack([owned, owned]),
        "unstack": lora.unstack(lora.stack([owned, owned]), like=[owned, owned])[1],
        "cat": lora.combine([owned, owned], [0.5, 0.5]),
        "svd": lora.combine([owned, owned], [0.5, 0.5], how="svd"),
        "ties": lora.combine([owned, owned], [0.5, 0.5], how="ties", density=0.5),
        "jit": jax.jit(lambda d: jax.tree.map(jnp.negative, d))(owned),
    }
    marks = {name: (d["layers"]["q_proj"].own_base, d["out"].own_base) for name, d in ways.items()}
    assert marks == dict.fromkeys(ways, ("loftq", ""))
    with pytest.raises(ValueError, match="layers/q_proj: some of the deltas belong to a base"):
        lora.combine([delta, owned], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"layers/q_proj: .*own_base='loftq'.*one base"):
        lora.stack([delta, owned])
