"""`adapt` among the other transforms, over every method and tree."""

import functools

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, moved
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax.models import llama
from lora_jax.training import checkpoints
from lora_jax.weights import as_matrix

CONFIG, PARAMS, TOKENS = cases.llama_case()
X = cases.X


def layers(params, x):
    """Plain JAX: a scan over stacked layers, then an output projection."""

    def layer(x, w):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(layer, x, params["layers"])[0] @ params["out"]


PLAIN = {"layers": cases.normal(1, 3, 6, 6) / 2, "out": cases.normal(2, 6, 4)}
LORA = lora.LoRA(rank=2, alpha=4.0)


@functools.cache
def transformed(method=LORA):
    base, delta = lora.lora_transform(PLAIN, method, targets=".*", key=jax.random.key(0))
    return base, moved(delta)


def merged_layers(delta, x):
    return layers(lora.merge(transformed()[0], delta), x)


def adapted_layers(delta, x):
    return lora.adapt(layers)(lora.bind(transformed()[0], delta), x)


@pytest.mark.sampled
def test_every_method_on_every_tree(case, method):
    """Models that are written with `linear` take arrays too: so `adapt` must agree with them."""
    base, delta = cases.transform(case, method)
    weights = lora.bind(base, moved(delta))
    assert_close(lora.adapt(case.apply)(weights, X), case.apply(weights, X))


def heads(params, x):
    """Attention kernels as Flax has them: two output axes, two contracted ones."""
    y = jnp.tanh(jnp.einsum("bd,dnh->bnh", x, params["q"]))
    return jnp.einsum("bnh,nhd->bd", y, params["o"])


@pytest.mark.sampled
def test_every_method_on_kernels_of_three_axes(method):
    params = {"q": cases.normal(0, 6, 2, 3), "o": cases.normal(1, 2, 3, 5)}
    layouts = lora.infer_layouts(heads, params, X)
    base, delta = lora.lora_transform(
        params, method, targets=".*", key=jax.random.key(0), layouts=layouts
    )
    weights = lora.bind(base, moved(delta))
    q, o = (as_matrix(weights[name], layouts[name]) for name in ("q", "o"))
    expected = lora.linear(jnp.tanh(lora.linear(X, q)), o)
    assert_close(lora.adapt(heads)(weights, X), expected)


def test_dropout_draws_as_in_a_model_written_with_linear():
    method = lora.LoRA(rank=2, dropout=0.5)
    delta = cases.llama_delta(PARAMS, method)
    weights = lora.bind(PARAMS, delta, dropout_key=jax.random.key(3))
    ours = jax.jit(lora.adapt(llama.forward), static_argnums=2)(weights, TOKENS, CONFIG)
    theirs = jax.jit(llama.forward, static_argnums=2)(weights, TOKENS, CONFIG)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_rows_use_their_own_adapter():
    deltas = [moved(transformed()[1], seed) for seed in range(3)]
    ids = jnp.array([2, 0, 1])
    weights = lora.bind(transformed()[0], lora.stack(deltas), adapter_ids=ids)
    x = cases.normal(3, 3, 5, 6)
    ours = lora.adapt(layers)(weights, x)
    each = [merged_layers(deltas[i], x[row]) for row, i in enumerate(ids)]
    assert_close(ours, jnp.stack(each), rtol=1e-4, atol=1e-5)


def test_a_slice_of_a_table_of_which_each_row_has_its_own():
    """There is no such array: it would differ from batch row to batch row."""
    deltas = lora.stack([moved(transformed()[1], seed) for seed in range(2)])
    weights = lora.bind(transformed()[0], deltas, adapter_ids=jnp.array([1, 0]))
    with pytest.raises(
        ValueError, match="^out: the function returns what slices a table of which each batch row"
    ):
        lora.adapt(lambda params: params["out"][:2])(weights)


def test_numpy_doubles_are_floats_to_jax():
    base, delta = transformed()
    x, ids = np.asarray(X, np.float64), np.array([2, 0])
    ours = lora.adapt(lambda p, x, ids: (layers(p, x), p["out"][ids]))(
        lora.bind(base, delta), x, ids
    )
    merged = lora.merge(base, delta)
    assert_close(ours, (layers(merged, X), merged["out"][ids]))


def test_without_a_weight_it_is_the_function():
    plain, ours = (jax.make_jaxpr(f)(PLAIN, X) for f in (layers, lora.adapt(layers)))
    assert str(ours) == str(plain)


def test_jit_does_not_retrace():
    calls = []

    def counted(params, x):
        calls.append(1)
        return layers(params, x)

    base, delta = transformed()
    run = jax.jit(lambda delta, x: lora.adapt(counted)(lora.bind(base, delta), x))
    first = run(delta, X)
    assert_close(run(moved(delta, 5), X + 1).shape, first.shape)
    assert len(calls) == 1


COMPOSED = {
    "itself": lambda f: f,
    "eval_shape": lambda f: lambda d, x: jnp.zeros(jax.eval_shape(f, d, x).shape),
    "value_and_grad": lambda f: jax.value_and_grad(lambda d, x: f(d, x).sum(), argnums=1),
    "checkpoint": lambda f: jax.grad(lambda d, x: jax.checkpoint(f)(d, x).sum(), argnums=1),
    "vmap over x": lambda f: lambda d, x: jax.vmap(f, in_axes=(None, 0))(d, x),
    "scan": lambda f: lambda d, x: jax.lax.scan(lambda c, _: (c, f(d, x)), 0, None, length=2)[1],
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", COMPOSED)
def test_it_composes_with(name):
    delta, transform = transformed()[1], COMPOSED[name]
    ours = transform(adapted_layers)(delta, X)
    assert_close(ours, transform(merged_layers)(delta, X), rtol=1e-4, atol=1e-5)


def test_it_composes_with_itself():
    base, delta = transformed()
    twice = lora.adapt(lora.adapt(layers))(lora.bind(base, delta), X)
    assert_close(twice, merged_layers(delta, X))


def test_a_sweep_by_vmap():
    deltas = [
        moved(lora.lora_transform(
            PLAIN, lora.LoRA(rank=rank), targets=".*", key=jax.random.key(0))[1], rank)
        for rank in (1, 3)
    ]  # fmt: skip
    together = jax.vmap(adapted_layers, in_axes=(0, None))(lora.stack(deltas), X)
    each = [merged_layers(delta, X) for delta in deltas]
    assert_close(together, jnp.stack(each), rtol=1e-4, atol=1e-5)


def test_shard_map_and_pmap_around_it():
    delta = transformed()[1]
    x = cases.normal(4, 4, 3, 6)
    expected = merged_layers(delta, x)
    replicated = jax.pmap(adapted_layers, in_axes=(None, 0), devices=jax.devices()[:4])
    assert_close(replicated(delta, x), expected, rtol=1e-4, atol=1e-5)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(adapted_layers, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    assert_close(split(delta, x), expected, rtol=1e-4, atol=1e-5)


def test_jvp_where_no_part_forbids_it():
    """A `Full` delta has every derivative; LoRA's product with B is reverse-mode only."""
    base, delta = transformed(lora.Full())
    tangent = jnp.ones_like(X)

    def run(weigh, f):
        return jax.jvp(lambda x: f(weigh(base, delta), x), (X,), (tangent,))

    assert_close(run(lora.bind, lora.adapt(layers)), run(lora.merge, layers))


def test_weights_that_come_back_are_those_that_went_in():
    base, delta = transformed()
    weights = lora.bind(base, delta)
    out, same = lora.adapt(lambda params, x: (layers(params, x), params))(weights, X)
    assert jax.tree.structure(same) == jax.tree.structure(weights) and out.shape == (3, 4)
    assert same["out"] is weights["out"]
    with pytest.raises(ValueError, match="out: the function returns this weight transposed"):
        lora.adapt(lambda params: params["out"].T)(weights)


def test_arguments_that_are_no_arrays_pass():
    base, delta = transformed()

    def run(params, x, *, scale, activation, skip=None):
        assert isinstance(scale, float) and skip is None
        return activation(layers(params, x)) * scale

    ours = lora.adapt(run)(lora.bind(base, delta), X, scale=2.0, activation=jnp.tanh)
    assert_close(ours, 2 * jnp.tanh(merged_layers(delta, X)))


def test_weights_may_come_by_keyword_and_in_parts():
    base, delta = transformed()
    weights = lora.bind(base, delta)
    ours = lora.adapt(lambda x, out, layers_: layers({"layers": layers_, "out": out}, x))(
        X, weights["out"], layers_=weights["layers"]
    )
    assert_close(ours, merged_layers(delta, X))


def test_adapters_of_a_foreign_model_save_and_load(tmp_path):
    delta = transformed()[1]
    checkpoints.save(tmp_path, 1, delta, identity={"base": "mine"}, position=None)
    _, loaded, _ = checkpoints.restore(tmp_path, delta, identity={"base": "mine"})
    chex.assert_trees_all_equal(loaded, delta)


def grouped(params, x):
    """A scan over stacked layers, kernels by heads, a table read by rows and by its transpose."""
    x = params["table"][x]
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]
    y = jnp.einsum("btd,dnh->btnh", x, params["q"])
    return jnp.einsum("btnh,nhd->btd", y, params["o"]) @ params["table"].T


@functools.cache
def quantised(format):
    params = {
        "layers": cases.normal(1, 2, 32, 32) / 6,
        "q": cases.normal(2, 32, 4, 8) / 6,
        "o": cases.normal(3, 4, 8, 32) / 6,
        "table": cases.normal(4, 32, 32),
    }
    ids = jnp.arange(6).reshape(2, 3)
    layouts = lora.infer_layouts(grouped, params, ids)
    how = cases.format_options(format, 8)
    base = lora.quantize(params, format, targets=".*", layouts=layouts, **how)
    return base, layouts, ids


@pytest.mark.parametrize("format", [*cases.STORAGES, pytest.param("int8", marks=pytest.mark.slow)])
def test_quantised_weights(format):
    """Frozen alone, and under LoRA: as their dense forms, with gradients that flow through them."""
    base, layouts, ids = quantised(format)
    dense = lora.dequantize(base)
    _, delta = jax.jit(
        lambda base: lora.lora_transform(
            base, lora.LoRA(rank=2), targets=".*", key=jax.random.key(0), layouts=layouts
        )
    )(base)
    delta = moved(delta)

    def loss(delta, run, base):
        return jnp.sin(run(lora.bind(base, delta), ids)).sum()

    @jax.jit
    def both(delta, base, dense):
        run = lora.adapt(grouped)
        frozen = run(base, ids), grouped(dense, ids)
        return frozen, [jax.grad(loss)(delta, run, weights) for weights in (base, dense)]

    frozen, slopes = both(delta, base, dense)
    assert_close(*frozen, rtol=1e-4, atol=1e-5)
    assert_close(*slopes, rtol=1e-3, atol=1e-5)


def test_a_quantised_weight_that_would_be_built():
    base, _, _ = quantised("nf4")
    message = r"^q: add, at .*test_adapt\.py:\d+, .*'q' out of quantize's targets, or run fn on deq"
    with pytest.raises(ValueError, match=message):
        lora.adapt(lambda params: params["q"] + 2)(base)
