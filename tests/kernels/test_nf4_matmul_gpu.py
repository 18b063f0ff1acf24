"""The Hopper kernel under the GPU interpreter, with its race detector."""

import jax
import jax.numpy as jnp
import nf4
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from lora_jax.kernels.nf4_matmul import mosaic_gpu

BF16, F32 = nf4.BFLOAT16, np.float32

needs_interpreter = pytest.mark.skipif(
    not hasattr(getattr(plgpu, "InterpretGPUParams", None), "on_race"),
    reason="this jax has no interpreter of GPU kernels that raises on a race",
)


@needs_interpreter
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    "M, K, N, block, dtype",
    [
        (3, 256, 512, 64, BF16),
        (20, 512, 256, 32, BF16),
        (70, 256, 256, 128, BF16),
        (5, 256, 256, 64, F32),
    ],
)
def test_is_the_product_in_float64_without_races(M, K, N, block, dtype, transpose):
    codes, absmax = nf4.weight(K, N, block)
    x = nf4.activation(M, N if transpose else K, dtype=dtype)
    y = mosaic_gpu.matmul(
        *map(jnp.asarray, (x, codes, absmax)),
        transpose=transpose,
        interpret=plgpu.InterpretGPUParams(detect_races=True),  # raises
    )
    w = nf4.dense(codes, absmax, dtype)
    nf4.assert_is_product(y, x, w.T if transpose else w)


@needs_interpreter
def test_the_race_detector_finds_a_race(caplog):
    """A write that nothing orders against a copy of the same bytes."""

    def kernel(out, staged):
        staged[...] = jnp.ones_like(staged)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, out)
        staged[...] = jnp.zeros_like(staged)
        plgpu.wait_smem_to_gmem(0)

    staged = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    f = plgpu.kernel(
        kernel,
        out_type=staged,
        scratch_types=[plgpu.SMEM(staged.shape, staged.dtype)],
        interpret=plgpu.InterpretGPUParams(detect_races=True, on_race="warn"),
    )
    jax.block_until_ready(f())
    assert "RACE DETECTED" in caplog.text
