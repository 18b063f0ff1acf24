"""The TPU kernel under the TPU interpreter, which poisons what lies beyond an array."""

import jax.numpy as jnp
import nf4
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from lora_jax.kernels.nf4_matmul import mosaic_tpu

BF16, F32 = nf4.BFLOAT16, np.float32
V5E, V6E = "TPU v5 lite", "TPU v6 lite"


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(
    "M, K, N, block, device_kind",
    [
        (1, 64, 40, 64, V5E),  # one row, one block, part of a strip
        (7, 256, 300, 32, V5E),  # ragged in rows and columns
        (16, 1536, 256, 64, V6E),  # three tiles along d_in
        (9, 512, 700, 128, V5E),  # ragged over two tiles of columns
        (530, 192, 128, 64, V5E),  # ragged over two tiles of rows, chunks of an odd size
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
