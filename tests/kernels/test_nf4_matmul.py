"""`nf4_matmul` on this platform: values, gradients, composition, and what it refuses."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import nf4
import numpy as np
import pytest

from lora_jax.kernels.nf4_matmul import nf4_matmul

BF16, F32 = nf4.BFLOAT16, np.float32


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(
    "rows, K, N, block",
    [((1,), 64, 1, 64), ((), 128, 40, 64), ((3, 2), 192, 24, 32), ((5,), 256, 7, 128)],
)
def test_both_directions_are_the_product_in_float64(rows, K, N, block, dtype):
    codes, absmax = nf4.weight(K, N, block)
    x = nf4.activation(*rows, K, dtype=dtype)
    dy = nf4.activation(*rows, N, dtype=dtype, seed=2)
    y, vjp = jax.vjp(nf4_matmul, x, codes, absmax)
    dx, d_codes, d_absmax = vjp(jnp.asarray(dy))
    w = nf4.dense(codes, absmax, dtype)
    nf4.assert_is_product(y, x, w)
    nf4.assert_is_product(dx, dy, w.T)
    assert d_codes.dtype == jax.dtypes.float0 and not d_absmax.any()


W = nf4.weight(128, 24, 64)


def test_only_packed_bytes_are_kept_for_the_backward_pass():
    x = nf4.activation(4, 128, dtype=F32)
    _, vjp = jax.vjp(lambda x: nf4_matmul(x, *W), x)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))
    assert kept == sum(leaf.nbytes for leaf in W)


def stacked(layers: int):
    weights = [nf4.weight(64, 64, 64, seed=seed) for seed in range(layers)]
    return tuple(np.stack(leaves) for leaves in zip(*weights, strict=True))


def layers_of(x, weights, *, remat: bool):
    def layer(x, weight):
        return jnp.tanh(nf4_matmul(x, *weight)), None

    return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, weights)[0].sum()


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_through_a_scan_equal_those_of_dense_weights(remat):
    weights, x = stacked(3), nf4.activation(2, 64, dtype=F32)

    def plain(x):
        for codes, absmax in zip(*weights, strict=True):
            x = jnp.tanh(x @ nf4.dense(codes, absmax, F32).astype(F32))
        return x.sum()

    grad = jax.jit(jax.grad(partial(layers_of, remat=remat)))(x, weights)
    np.testing.assert_allclose(grad, jax.grad(plain)(x), rtol=0, atol=2e-5)


def test_vmap_over_inputs_weights_and_both():
    weights, x = stacked(3), nf4.activation(3, 2, 64, dtype=F32)
    dense = [nf4.dense(*weight, F32) for weight in zip(*weights, strict=True)]
    both = jax.vmap(nf4_matmul)(x, *weights)
    one_x = jax.vmap(nf4_matmul, (None, 0, 0))(x[0], *weights)
    one_w = jax.vmap(nf4_matmul, (0, None, None))(x, *(leaf[0] for leaf in weights))
    for i in range(3):
        nf4.assert_is_product(both[i], x[i], dense[i])
        nf4.assert_is_product(one_x[i], x[0], dense[i])
        nf4.assert_is_product(one_w[i], x[i], dense[0])


def test_pmap_and_shard_map():
    x, w = nf4.activation(4, 2, 128, dtype=F32), nf4.dense(*W, F32)
    value = jax.value_and_grad(lambda x: nf4_matmul(x, *W).sum())
    y, dx = jax.pmap(value, devices=jax.devices()[:4])(x)
    np.testing.assert_allclose(y, (x.astype(np.float64) @ w).sum((1, 2)), rtol=1e-5)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.shard_map(
        lambda x: nf4_matmul(x, *W), mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data")
    )
    nf4.assert_is_product(jax.jit(rows)(x), x, w)
    np.testing.assert_allclose(jax.grad(lambda x: jax.jit(rows)(x).sum())(x), dx, rtol=1e-6, atol=0)


def refuses(message, x, codes, absmax, **kwargs):
    with pytest.raises(ValueError, match=re.escape(message)):
        nf4_matmul(jnp.asarray(x), jnp.asarray(codes), jnp.asarray(absmax), **kwargs)


def test_arguments_that_do_not_fit_are_refused():
    x, (codes, absmax) = nf4.activation(4, 128, dtype=F32), W
    refuses("x is float16; cast it", x.astype(np.float16), codes, absmax)
    refuses("codes are int8", x, codes.astype(np.int8), absmax)
    refuses("absmax is bfloat16", x, codes, absmax.astype(BF16))
    refuses("does not end in d_in = 128", x[:, :64], codes, absmax)
    refuses("does not end in d_in = 128", x[0, 0], codes, absmax)
    refuses("slice stacked layers first", x, codes[None], absmax[None])
    refuses("are not [d_in / 2, d_out]", x, codes, absmax[:, :3])
    refuses("3 rows of absmax do not divide d_in = 128", x, codes, np.repeat(absmax[:1], 3, 0))
    refuses("of an even size", x, codes, np.repeat(absmax[:1], 128, 0))


def test_a_kernel_asked_for_by_name_never_falls_back():
    x = nf4.activation(4, 128, dtype=F32)
    for name, needs in [("mosaic_gpu", "needs a Hopper GPU"), ("mosaic_tpu", "needs a TPU")]:
        message = f"{name!r} {needs}, and this program is for a cpu"
        refuses(message, x, *W, implementation=name)
    refuses("'triton' is not one of xla, mosaic_gpu, mosaic_tpu", x, *W, implementation="triton")
    nf4.assert_is_product(nf4_matmul(x, *W, implementation="xla"), x, nf4.dense(*W, F32))
