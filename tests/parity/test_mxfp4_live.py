"""gpt-oss's tensors as transformers decodes them."""

import numpy as np
import pytest

from lora_jax.quant import MXFP4

torch = pytest.importorskip("torch")
convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_of_gpt_oss(dtype):
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 40, 4, 16), np.uint8)
    scales = rng.integers(10, 240, (3, 40, 4), np.uint8)
    theirs = convert(
        torch.from_numpy(blocks), torch.from_numpy(scales), dtype=getattr(torch, dtype)
    )
    ours = MXFP4.from_blocks(blocks, scales, dtype=dtype).dense()
    assert ours.dtype == dtype and ours.shape == (3, 128, 40)
    np.testing.assert_array_equal(np.asarray(ours, np.float32), theirs.float().numpy())
