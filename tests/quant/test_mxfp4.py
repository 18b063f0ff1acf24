"""MXFP4 by OCP's specification of Microscaling Formats, version 1.0, and gpt-oss's tensors."""

import cases
import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.quant import MXFP4

POSITIVE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
ELEMENTS = np.array(POSITIVE + [-x for x in POSITIVE])
NORMAL = 2.0**-126  # the smallest; XLA flushes what is smaller on a CPU


def plain_decode(blocks, scales):
    """A checkpoint's tensors as float64 `[..., d_out, d_in]`, byte by byte."""
    low, high = ELEMENTS[blocks & 15], ELEMENTS[blocks >> 4]
    values = np.stack([low, high], axis=-1).reshape(*blocks.shape[:-1], 32)
    values = values * 2.0 ** (scales.astype(np.float64) - 127)[..., None]
    values[scales == 255] = np.nan
    return values.reshape(*blocks.shape[:-2], -1)


def every_scale():
    """A block of random elements, all sixteen among them, under each of the 256 scales."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 64, 2, 16), np.uint8)
    blocks[..., :8] = np.array([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], np.uint8)
    return blocks, np.arange(256, dtype=np.uint8).reshape(2, 64, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_gpt_oss_is_exact(dtype):
    blocks, scales = every_scale()
    with np.errstate(over="ignore"):  # 2 * 2^127 and more are infinite
        expected = plain_decode(blocks, scales).astype(np.float32).swapaxes(-1, -2)
    weight = MXFP4.from_blocks(blocks, scales, dtype=dtype)
    assert weight.shape == (2, 64, 64) and weight.dtype == dtype
    on_host = np.asarray(lora.dequantize({"w": weight})["w"])
    assert on_host.dtype == dtype
    np.testing.assert_array_equal(on_host.astype(np.float32), expected)
    is_normal = ~(np.abs(expected) < NORMAL)
    for dense in (weight.dense(), jax.jit(lambda w: w.dense())(weight)):
        found = np.asarray(dense).astype(np.float32)
        np.testing.assert_array_equal(found[is_normal], expected[is_normal])
        assert (np.abs(found[~is_normal]) < NORMAL).all()


def test_products_and_rows_of_gpt_oss():
    """With the experts as stacked layers, by each expert's plain matrix."""
    blocks, scales = every_scale()
    scales = 120 + scales % 8
    weight = MXFP4.from_blocks(blocks, scales, dtype=jnp.float32)
    plain = plain_decode(blocks, scales).astype(np.float32)
    x, tokens = cases.normal(0, 5, 64), jnp.array([[0, 33], [63, 2]])
    for expert in range(2):
        one = jax.tree.map(lambda leaf, expert=expert: leaf[expert], weight)
        cases.assert_close(lora.linear(x, one), x @ plain[expert].T, atol=1e-5)
        np.testing.assert_array_equal(lora.embed(tokens, one), plain[expert].T[tokens])


def plain_quantize(column):
    """Section 6.3 for one block of numbers: elements and the exponent of their scale."""
    largest = np.abs(column).max()
    exponent = max(int(np.floor(np.log2(largest))) - 2, -127) if largest else -127
    scaled = column / 2.0**exponent
    distance = np.abs(np.clip(scaled, -6, 6)[:, None] - ELEMENTS[:8] * np.sign(scaled)[:, None])
    nearest = [np.flatnonzero(row == row.min()) for row in distance]
    codes = [next(i for i in tied if len(tied) == 1 or i % 2 == 0) for tied in nearest]
    return np.sign(column) * ELEMENTS[codes] * 2.0**exponent, exponent


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_quantising_is_that_of_the_specification(dtype):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(96, 24)) * 2.0 ** rng.integers(-140, 120, (3, 24)).repeat(32, axis=0)
    w[:32, 0] = 0
    w[32:64, 0] = np.float32(2**-140)
    w = w.astype(dtype)
    weight = lora.quantize({"w": jnp.asarray(w)}, "mxfp4", targets="w")["w"]
    values = np.asarray(weight.dense_on_host()).astype(np.float64)
    for o, i in np.ndindex(24, 3):
        expected, exponent = plain_quantize(w[32 * i : 32 * i + 32, o].astype(np.float64))
        np.testing.assert_array_equal(values[32 * i : 32 * i + 32, o], expected)
        assert weight.scales[i, o] == exponent + 127


def test_ties_go_to_even_and_what_is_above_six_is_clamped():
    given = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 5.01, 7.9, 0.2501, 0.2499, 0]
    rounded = [0, 1, 1, 2, 2, 4, 4, 6, 6, 0.5, 0, 0]
    w, expected = (
        np.array([*x, *np.negative(x), *[0] * 8], np.float32)[:, None] for x in (given, rounded)
    )
    for exponent in (0, -100, 100):
        weight = lora.quantize({"w": np.ldexp(w, exponent)}, "mxfp4", targets="w")["w"]
        assert weight.scales.tolist() == [[127 + exponent]]
        np.testing.assert_array_equal(weight.dense(), np.ldexp(expected, exponent))


def test_blocks_of_zeros():
    weight = lora.quantize({"w": jnp.zeros((64, 3))}, "mxfp4", targets="w")["w"]
    assert not np.any(weight.codes) and not np.any(weight.scales) and not np.any(weight.dense())


def test_a_quantised_matrix_is_that_of_its_checkpoint():
    """What gpt-oss would store of it comes back as the same arrays."""
    weight = lora.quantize({"w": cases.normal(0, 3, 64, 40)}, "mxfp4", targets="w")["w"]
    codes = np.stack([weight.codes >> 4, weight.codes & 15], axis=-2).reshape(3, 64, 40)
    rows = codes.swapaxes(-1, -2)
    blocks = (rows[..., 1::2] << 4 | rows[..., ::2]).reshape(3, 40, 2, 16)
    again = MXFP4.from_blocks(blocks, np.swapaxes(weight.scales, -1, -2), dtype="float32")
    chex.assert_trees_all_equal(again, weight)
    assert repr(weight) == "MXFP4(3x64x40 float32, blocks of 32, 4.250 bits a parameter)"


def test_what_it_does_not_have():
    def bad(match, rows=64, **options):
        with pytest.raises(ValueError, match=match):
            lora.quantize({"w": np.ones((rows, 4), np.float32)}, "mxfp4", targets="w", **options)

    bad("double_quant=True: mxfp4 has no scales in float32.* Leave it out", double_quant=True)
    bad("block_size=64: expected one of 32 for mxfp4", block_size=64)
    bad("w has 48 rows .* no multiple of the block size 32: leave it out", rows=48)
    lora.quantize({"w": jnp.ones((32, 4))}, "mxfp4", targets="w", block_size=32, double_quant=False)


@pytest.mark.parametrize(
    ("blocks", "scales"),
    [
        (np.zeros((8, 2, 16), np.uint8), np.zeros((8, 3), np.uint8)),
        (np.zeros((8, 2, 8), np.uint8), np.zeros((8, 2), np.uint8)),
        (np.zeros((8, 2, 16), np.int8), np.zeros((8, 2), np.uint8)),
        (np.zeros((8, 2, 16), np.uint8), np.zeros((8, 2), np.float32)),
        (np.zeros((2, 16), np.uint8), np.zeros(2, np.uint8)),
    ],
)
def test_blocks_that_are_no_checkpoints(blocks, scales):
    with pytest.raises(
        ValueError, match=r"blocks are .* expected uint8 \[\.\.\., d_out, d_in / 32"
    ):
        MXFP4.from_blocks(blocks, scales)
