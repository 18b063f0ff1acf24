"""The TPU kernel under the TPU interpreter, which poisons what lies beyond an array."""

from functools import partial

import jax
import jax.numpy as jnp
import nf4
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from lora_jax.kernels.nf4_matmul import mosaic_tpu, over_rows

BF16, F32 = nf4.BFLOAT16, np.float32
V5E, V6E = "TPU v5 lite", "TPU v6 lite"


@pytest.mark.sampled
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    "M, K, N, block, device_kind, dtype",
    [
        (1, 64, 40, 64, V5E, BF16),  # one row, one block, part of a strip
        (1, 64, 40, 64, V5E, F32),
        (7, 256, 300, 32, V5E, BF16),  # ragged in rows and columns
        (7, 256, 300, 32, V5E, F32),
        (16, 1536, 256, 64, V6E, BF16),  # three tiles along d_in
        (9, 512, 700, 128, V5E, BF16),  # ragged over two tiles of columns
        (530, 192, 128, 64, V5E, F32),  # ragged over two tiles of rows, chunks of an odd size
    ],
)
def test_is_the_product_in_float64(M, K, N, block, device_kind, dtype, transpose):
    codes, absmax = nf4.weight(K, N, block)
    x = nf4.activation(M, N if transpose else K, dtype=dtype)
    y = mosaic_tpu.matmul(
        *map(jnp.asarray, (x, codes, absmax)),
        transpose=transpose,
        device_kind=device_kind,
        interpret=pltpu.InterpretParams(uninitialized_memory="nan"),
    )
    w = nf4.dense(codes, absmax, dtype)
    nf4.assert_is_product(y, x, w.T if transpose else w)


INTERPRETED = partial(
    mosaic_tpu.matmul, device_kind=V5E, interpret=pltpu.InterpretParams(uninitialized_memory="nan")
)


def test_a_batch_of_a_vmap_is_more_rows_of_one_weight():
    weights = [nf4.weight(64, 40, 64, seed=seed) for seed in range(2)]
    x = nf4.activation(2, 3, 64, dtype=F32)
    f = partial(over_rows, partial(INTERPRETED, transpose=False))
    calls = str(jax.make_jaxpr(jax.vmap(f, (0, None, None)))(x, *weights[0]))
    assert calls.count("pallas_call[") == 1 and "f32[6,40]" in calls
    both = jax.vmap(f)(x, *map(np.stack, zip(*weights, strict=True)))
    for i in range(2):
        nf4.assert_is_product(both[i], x[i], nf4.dense(*weights[i], F32))


def test_it_runs_in_a_rematerialised_scan_and_under_shard_map():
    codes, absmax = nf4.weight(64, 64, 64)
    x = nf4.activation(2, 64, dtype=F32)
    w = nf4.dense(codes, absmax, F32)

    def layer(x, weight):
        return over_rows(partial(INTERPRETED, transpose=False), x, *weight), None

    stacked = codes[None].repeat(2, 0), absmax[None].repeat(2, 0)
    y, _ = jax.jit(lambda x: jax.lax.scan(jax.checkpoint(layer), x, stacked))(x)
    np.testing.assert_allclose(y, x @ w @ w, rtol=0, atol=1e-5)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.shard_map(
        partial(over_rows, partial(INTERPRETED, transpose=True)),
        mesh=mesh,
        in_specs=(jax.P("data"), jax.P(), jax.P()),
        out_specs=jax.P("data"),
        check_vma=False,
    )
    nf4.assert_is_product(jax.jit(rows)(x, codes, absmax), x, w.T)
