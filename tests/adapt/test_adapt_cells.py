"""Recurrent cells of every library: some concatenate their kernels, some split one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from cases import assert_close, moved, normal

import lora_jax as lora

X = normal(0, 2, 4, 8)


def redrawn(params):
    seeds = iter(range(100))
    return jax.tree.map(lambda leaf: normal(next(seeds), *leaf.shape) / 3, params)


def linen(cell):
    model = nn.RNN(cell(8))
    return model.apply, redrawn(jax.eval_shape(model.init, jax.random.key(0), X))


def equinox(name):
    eqx = pytest.importorskip("equinox")
    cell = getattr(eqx.nn, name)(8, 8, key=jax.random.key(0))
    start = jnp.zeros(8) if name == "GRUCell" else (jnp.zeros(8), jnp.zeros(8))

    def run(cell, x):
        def step(state, x):
            state = cell(x, state)
            return state, jax.tree.leaves(state)[0]

        return jax.vmap(lambda x: jax.lax.scan(step, start, x)[1])(x)

    return run, cell


def haiku(name):
    hk = pytest.importorskip("haiku")

    def forward(x):
        core = getattr(hk, name)(8)
        return hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))[0]

    model = hk.without_apply_rng(hk.transform(forward))
    return model.apply, redrawn(jax.eval_shape(model.init, jax.random.key(0), X))


CELLS = {
    "linen_optimized_lstm": (linen, nn.OptimizedLSTMCell),
    "linen_lstm": (linen, nn.LSTMCell),
    "linen_gru": (linen, nn.GRUCell),
    "equinox_lstm": (equinox, "LSTMCell"),
    "equinox_gru": (equinox, "GRUCell"),
    "haiku_lstm": (haiku, "LSTM"),
    "haiku_gru": (haiku, "GRU"),
}
QUICK = ("linen_optimized_lstm", "haiku_gru")


@pytest.mark.mixed_dtypes
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CELLS]
)
def test_an_adapted_cell_is_the_merged_one(name):
    make, cell = CELLS[name]
    apply, params = make(cell)
    layouts = lora.infer_layouts(apply, params, X)
    wide = {
        path
        for path, leaf in lora.paths.flatten(params).items()
        if lora.paths.is_array(leaf) and leaf.ndim == 2
    }
    base, delta = lora.lora_transform(
        params, lora.LoRA(rank=2), key=jax.random.key(0), layouts=layouts
    )
    assert lora.transform.delta_nodes(delta).keys() == wide, "every matrix of it"
    delta = moved(delta, size=0.3)

    def side(run, weigh, delta):
        def loss(delta):
            y = run(weigh(base, delta), X)
            return jnp.sin(y).mean(), y

        return jax.grad(loss, has_aux=True)(delta)

    @jax.jit
    def both(delta):
        return side(lora.adapt(apply), lora.bind, delta), side(apply, lora.merge, delta)

    ours, theirs = both(delta)
    mask = lora.trainable_mask(delta)
    grads = [jax.tree.map(lambda g, t: g if t else 0 * g, side[0], mask) for side in (ours, theirs)]
    assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-5)
    assert_close(*grads, rtol=1e-3, atol=1e-5)
