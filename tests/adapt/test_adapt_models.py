"""Models of other libraries, built of their own blocks, with nothing of ours in them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, moved, normal
from flax import nnx

import lora_jax as lora

TOKENS = np.array([[3, 1, 4, 1], [5, 9, 2, 6]], np.int32)
VOCAB, WIDTH = 11, 8


class Block(nn.Module):
    """One layer of everything: attention by heads, a grouped projection, an einsum, a dropout."""

    @nn.compact
    def __call__(self, x, deterministic):
        y = nn.LayerNorm()(x)
        x += nn.MultiHeadDotProductAttention(num_heads=2, deterministic=deterministic)(y, y)
        y = nn.DenseGeneral((3, 4), axis=-1)(nn.LayerNorm()(x))
        y = nn.Dropout(0.5, deterministic=deterministic)(nn.gelu(y))
        y = nn.DenseGeneral(WIDTH, axis=(-2, -1))(y)
        return x + nn.Einsum((WIDTH, WIDTH), "btd,df->btf")(y), None


class LinenLM(nn.Module):
    """Scanned and rematerialised layers, a convolution, a tied output head."""

    @nn.compact
    def __call__(self, tokens, deterministic=True):
        table = nn.Embed(VOCAB, WIDTH)
        layers = nn.scan(
            nn.remat(Block, static_argnums=(2,)),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=2,
        )
        x = nn.Conv(WIDTH, (2,))(table(tokens))
        x, _ = layers()(x, deterministic)
        return table.attend(nn.LayerNorm()(x))


class NnxLM(nnx.Module):
    def __init__(self, rngs):
        self.table = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=2, in_features=WIDTH, decode=False, rngs=rngs
        )
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.split = nnx.LinearGeneral(WIDTH, (2, 5), rngs=rngs)
        self.join = nnx.LinearGeneral((2, 5), WIDTH, axis=(-2, -1), rngs=rngs)

    def __call__(self, tokens):
        x = self.table(tokens)
        x = x + self.attention(self.norm(x))
        return self.table.attend(x + self.join(nnx.gelu(self.split(x))))


def redrawn(params):
    """Entries that tell biases from nothing, drawn faster than a library draws them."""
    seeds = iter(range(100))
    return jax.tree.map(lambda leaf: normal(next(seeds), *leaf.shape) / 3, params)


def linen():
    model = LinenLM()
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    return model.apply, redrawn(shapes)


def nnx_lm():
    graph, params = nnx.split(nnx.eval_shape(lambda: NnxLM(nnx.Rngs(0))), nnx.Param)
    return lambda params, tokens: nnx.merge(graph, params)(tokens), redrawn(params)


def equinox():
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        table: eqx.nn.Embedding
        attention: eqx.nn.MultiheadAttention
        into: eqx.nn.Linear
        out: eqx.nn.Linear

        def __init__(self, key):
            keys = iter(jax.random.split(key, 4))
            self.table = eqx.nn.Embedding(VOCAB, WIDTH, key=next(keys))
            self.attention = eqx.nn.MultiheadAttention(2, WIDTH, key=next(keys))
            self.into = eqx.nn.Linear(WIDTH, 12, key=next(keys))
            self.out = eqx.nn.Linear(12, VOCAB, key=next(keys))

        def __call__(self, tokens):
            x = jax.vmap(self.table)(tokens)
            x = x + self.attention(x, x, x)
            return jax.vmap(lambda x: self.out(jax.nn.relu(self.into(x))))(x)

    model = eqx.filter_eval_shape(Model, jax.random.key(0))
    params, rest = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return lambda params, tokens: jax.vmap(eqx.combine(params, rest))(tokens), redrawn(params)


def haiku():
    hk = pytest.importorskip("haiku")

    def model(tokens):
        x = hk.Embed(VOCAB, WIDTH)(tokens)
        x += hk.MultiHeadAttention(2, 4, w_init=hk.initializers.Constant(0.1), model_size=WIDTH)(
            x, x, x
        )
        return hk.nets.MLP([12, VOCAB])(x)

    pure = hk.without_apply_rng(hk.transform(model))
    return pure.apply, redrawn(jax.eval_shape(pure.init, jax.random.key(0), TOKENS))


# Each library's model, its targets, and how many leaves "all-linear" finds in it.
MODELS = {"linen": (linen, 8), "nnx": (nnx_lm, 6), "equinox": (equinox, 6), "haiku": (haiku, 6)}


@functools.cache
def model(name):
    build, found = MODELS[name]
    apply, params = build()
    return apply, params, lora.infer_layouts(apply, params, TOKENS), found


@pytest.mark.mixed_dtypes
@pytest.mark.parametrize(
    "name", ["linen", *(pytest.param(name, marks=pytest.mark.slow) for name in list(MODELS)[1:])]
)
def test_an_adapted_model_is_the_merged_one(name):
    apply, params, layouts, found = model(name)
    base, delta = lora.lora_transform(
        params, lora.LoRA(rank=2), key=jax.random.key(1), layouts=layouts
    )
    assert len(lora.transform.delta_nodes(delta)) == found
    fresh = lora.adapt(apply)(lora.bind(base, delta), TOKENS)
    assert_close(fresh, apply(params, TOKENS), rtol=1e-4, atol=1e-5)

    def loss(run, weigh, delta):
        logits = run(weigh(base, delta), TOKENS)
        return jnp.sin(logits).mean(), logits

    delta = moved(delta, size=0.1)
    ours, theirs = (
        jax.jit(jax.grad(functools.partial(loss, run, weigh), has_aux=True))(delta)
        for run, weigh in ((lora.adapt(apply), lora.bind), (apply, lora.merge))
    )
    mask = lora.trainable_mask(delta)
    grads = [jax.tree.map(lambda g, t: g if t else 0 * g, side[0], mask) for side in (ours, theirs)]
    assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-5)
    assert_close(*grads, rtol=1e-3, atol=1e-5)


@pytest.mark.sampled
@pytest.mark.mixed_dtypes
@pytest.mark.parametrize("name", MODELS)
def test_adapters_have_the_paths_of_the_users_tree(name):
    _, params, layouts, _ = model(name)
    _, delta = lora.lora_transform(
        params, lora.LoRA(rank=1), key=jax.random.key(1), layouts=layouts
    )
    assert lora.transform.delta_nodes(delta).keys() <= lora.paths.flatten(params).keys()


@pytest.mark.mixed_dtypes
def test_the_table_of_a_tied_head_can_be_adapted():
    apply, params, layouts, _ = model("linen")
    table = "params/Embed_0/embedding"
    assert layouts[table] == lora.Layout() and layouts[table].gathered
    base, delta = lora.lora_transform(
        params, lora.LoRA(rank=2), targets=table, key=jax.random.key(1), layouts=layouts
    )
    delta = moved(delta, size=0.1)
    ours = lora.adapt(apply)(lora.bind(base, delta), TOKENS)
    assert_close(ours, apply(lora.merge(base, delta), TOKENS), rtol=1e-4, atol=1e-5)


@pytest.mark.mixed_dtypes
def test_flax_dropout_and_adapter_dropout_draw_apart():
    """Arguments that are no arrays and dictionaries of keys go through; so does our own dropout."""
    apply, params, layouts, _ = model("linen")
    method = lora.LoRA(rank=2, dropout=0.5)
    base, delta = lora.lora_transform(params, method, key=jax.random.key(1), layouts=layouts)
    delta = moved(delta, size=0.1)
    run = lora.adapt(functools.partial(apply, deterministic=False))
    weights = [lora.bind(base, delta, dropout_key=jax.random.key(i)) for i in (0, 0, 1)]
    outs = [run(w, TOKENS, rngs={"dropout": jax.random.key(7)}) for w in weights]
    np.testing.assert_array_equal(outs[0], outs[1])
    assert np.abs(outs[0] - outs[2]).max() > 1e-3


@pytest.mark.mixed_dtypes
def test_a_convolution_that_was_adapted_as_a_stack_of_matrices():
    apply, params, layouts, _ = model("linen")
    kernel = "params/Conv_0/kernel"
    assert layouts[kernel] == lora.Layout(contracted=(-3, -2), output=(-1,))
    base, delta = lora.lora_transform(
        params, lora.LoRA(rank=2), targets=kernel, key=jax.random.key(0)
    )
    with pytest.raises(ValueError, match=f"{kernel}: conv_general_dilated, at .*{__file__}"):
        lora.adapt(apply)(lora.bind(base, delta), TOKENS)
