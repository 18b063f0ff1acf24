"""Quantising holds one leaf in floating point at a time."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource
import jax.numpy as jnp
import numpy as np
from lora_jax.quant import quantizer

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

finish = quantizer("nf4")
finish("warm_up/up_proj", jnp.ones((64, 64)))
before, tree = peak(), {}
for i in range(12):
    leaf = np.full((2, 4096, 2048), i + 1, np.float32)  # 64 MiB
    tree[i] = finish(f"{i}/up_proj", leaf)
    del leaf
stored = sum(weight.nbytes for weight in tree.values())
print(peak() - before - stored)
"""


@pytest.mark.slow
def test_a_model_needs_its_result_and_its_largest_leaf():
    """Of 12 leaves of 64 MiB one is there at a time, and a little to work with."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 1.5 * (64 << 20)
