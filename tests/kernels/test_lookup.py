"""Codes to values: both ways, and which of them a TPU's program has."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import context_mesh
from lora_jax.kernels import lookup
from lora_jax.quant import FORMATS, codebooks

CODEBOOKS = {name: FORMATS[name].codebook for name in cases.CODEBOOKS}
CODEBOOKS["dynamic"] = codebooks.DYNAMIC8


@pytest.mark.sampled
@pytest.mark.parametrize("name", CODEBOOKS)
def test_both_ways_give_the_bits_of_the_codebook(name):
    codebook = CODEBOOKS[name]
    codes = np.random.default_rng(0).integers(0, len(codebook), (3, 5, 100), np.uint8)
    codes.flat[: len(codebook)] = np.arange(len(codebook))
    values = tuple(codebook.tolist())
    for way in (lookup._gathered, lookup._selected):
        found = np.asarray(way(values, jnp.asarray(codes)))
        np.testing.assert_array_equal(found.view(np.uint32), codebook[codes].view(np.uint32))


class TPU:
    platform = "tpu"


def test_a_tpu_gathers_nothing(monkeypatch):
    """Nor does a CPU select, where the same trace is lowered for its host."""
    monkeypatch.setattr(context_mesh, "device", TPU)
    codes = jax.ShapeDtypeStruct((2, 4, 256), jnp.uint8)

    def layers(codes):
        return jax.lax.map(lambda layer: lookup.look_up(codebooks.DYNAMIC8, layer), codes)

    traced = jax.jit(layers).trace(codes)
    texts = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("tpu", "cpu")}
    assert "stablehlo.gather" not in texts["tpu"] and "stablehlo.select" in texts["tpu"]
    assert "stablehlo.gather" in texts["cpu"] and "stablehlo.select" not in texts["cpu"]
