"""Codes, scales and values as bitsandbytes' CPU build computes them, bit for bit.

The values in tests/golden/bitsandbytes.npz were recorded by scripts/record_golden_bitsandbytes.py.
"""

from pathlib import Path

import bitsandbytes_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.quant import FORMATS, from_bitsandbytes, to_bitsandbytes
from lora_jax.quant.double import decode_double, double_quantize, torch_mean
from lora_jax.quant.encode import decode, encode, pack

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "bitsandbytes.npz")
TENSORS = bitsandbytes_cases.tensors()
CASES = bitsandbytes_cases.CASES
BLOCK = bitsandbytes_cases.BLOCK


def compute(x: np.ndarray, quant_type: str, double_quant: bool) -> dict[str, np.ndarray]:
    """Of a flat tensor, which is a matrix of one column."""
    codebook = FORMATS[quant_type].codebook
    codes, absmax = encode(x[:, None], codebook, block_size=BLOCK)
    found = {"codes": pack(codes)[:, 0], "absmax": absmax[:, 0]}
    if double_quant:
        parts = double_quantize(absmax)
        absmax = decode_double(*parts)
        found |= {"absmax": parts[0][:, 0], "scale": parts[1], "offset": np.asarray(parts[2])}
    found["values"] = decode(codes, absmax, codebook, block_size=BLOCK)[:, 0]
    return found


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        found = ours[key]
        assert found.dtype == expected.dtype and found.shape == expected.shape, key
        if key == "values":  # with AVX-512 its FP4 has no negative zero
            found, expected = found + np.float32(0), expected + np.float32(0)
        kind = np.uint8 if expected.itemsize == 1 else np.uint32
        np.testing.assert_array_equal(found.view(kind), expected.view(kind), err_msg=key)


@pytest.mark.parametrize("case", CASES, ids=bitsandbytes_cases.case_id)
def test_recorded_values(case):
    prefix = f"{bitsandbytes_cases.case_id(case)}/"
    golden = {k.removeprefix(prefix): GOLDEN[k] for k in GOLDEN.files if k.startswith(prefix)}
    assert golden
    assert_same_bits(compute(TENSORS[case[0]], *case[1:]), golden)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_quantised_matrix_holds_the_recorded_bytes(quant_type, double_quant):
    case = ("nested", quant_type, double_quant)
    x, prefix = TENSORS["nested"], f"{bitsandbytes_cases.case_id(case)}/"
    d_out, d_in = 65, 4 * BLOCK
    tree = {"w": jnp.asarray(x.reshape(d_out, d_in).T)}
    weight = lora.quantize(tree, quant_type, double_quant=double_quant)["w"]
    np.testing.assert_array_equal(weight.codes.T.reshape(-1), GOLDEN[prefix + "codes"])
    absmax = weight.absmax.codes if double_quant else weight.absmax
    np.testing.assert_array_equal(absmax.T.reshape(-1), GOLDEN[prefix + "absmax"])
    values = GOLDEN[prefix + "values"].reshape(d_out, d_in).T
    np.testing.assert_array_equal(lora.dequantize({"w": weight})["w"], values)
    np.testing.assert_array_equal(jax.jit(lambda w: w.dense())(weight), values)


@pytest.fixture(scope="module")
def bnb():
    pytest.importorskip("bitsandbytes", reason="requirements-parity.txt is not installed")
    import bitsandbytes_model
    import torch

    torch.set_num_threads(1)  # several threads add a long tensor's absmax in another order
    return bitsandbytes_model


@pytest.mark.parametrize("case", CASES, ids=bitsandbytes_cases.case_id)
def test_the_installed_bitsandbytes(bnb, case):
    x = TENSORS[case[0]]
    assert_same_bits(compute(x, *case[1:]), bnb.compute(x, *case[1:]))


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_large_tensor(bnb, double_quant):
    x = bitsandbytes_cases.draw(9, 70_000 * BLOCK)
    assert_same_bits(compute(x, "nf4", double_quant), bnb.compute(x, "nf4", double_quant))


@pytest.mark.parametrize("count", [1, 7, 8, 31, 32, 63, 1000, 16 * 16 * 32 + 5, 300_000])
def test_the_mean_is_torchs(bnb, count):
    import torch

    x = np.abs(bitsandbytes_cases.draw(count, count))
    assert torch_mean(x) == torch.from_numpy(x).mean().item()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_state_dicts_convert_both_ways(bnb, quant_type, double_quant, dtype):
    w = TENSORS["nested"].reshape(65, 4 * BLOCK)
    theirs, values = bnb.state_dict(w, quant_type, double_quant, dtype)
    weight = from_bitsandbytes(theirs)
    assert weight.shape == (4 * BLOCK, 65) and weight.dtype == jnp.dtype(dtype)
    dense = lora.dequantize({"w": weight})["w"]
    np.testing.assert_array_equal(np.asarray(dense).astype(np.float32).T, values)
    ours = to_bitsandbytes(weight)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype
        np.testing.assert_array_equal(ours[name], expected, err_msg=name)
    np.testing.assert_array_equal(bnb.dequantize(ours), values)
