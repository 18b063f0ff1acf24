"""The tokens that top_p leaves, against the warper of transformers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lora_jax.models.generate import nucleus  # noqa: E402


@pytest.mark.parametrize("top_p", [0.0, 1e-6, 0.05, 0.3, 0.5, 0.77, 0.95, 0.999])
def test_the_nucleus_is_that_of_transformers(top_p):
    logits = np.random.default_rng(0).normal(size=(64, 300)).astype(np.float32) * 2
    theirs = transformers.TopPLogitsWarper(top_p)(None, torch.from_numpy(logits)).numpy()
    np.testing.assert_array_equal(nucleus(logits, top_p), theirs)


@pytest.mark.parametrize("top_p", [-0.1, 1.1])
def test_transformers_refuses_the_same(top_p):
    with pytest.raises(ValueError, match="top_p"):
        transformers.TopPLogitsWarper(top_p)
