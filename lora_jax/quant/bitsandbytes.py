"""4-bit weights as bitsandbytes serialises them, both ways and without loss.

A linear layer's `weight` is a column of packed bytes; beside it are `weight.absmax`,
`weight.quant_map`, for double quantisation `weight.nested_absmax` and `weight.nested_quant_map`,
and `weight.quant_state.bitsandbytes__nf4` (or `__fp4`), JSON as bytes. All are numpy arrays here.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.layouts import Layout
from lora_jax.quant import codebooks
from lora_jax.quant.blockwise import FP4, NF4, Blockwise
from lora_jax.quant.double import NESTED_BLOCK, DoubleQuantized
from lora_jax.quant.quantized import Quantized

_FORMATS: dict[str, type[Blockwise]] = {"nf4": NF4, "fp4": FP4}
_STATE = "quant_state.bitsandbytes__"
_LARGEST = 1 << 31  # no size is larger; a flipped digit is


def from_bitsandbytes(tensors: Mapping[str, np.ndarray], name: str = "weight") -> Blockwise:
    """The weight `[d_in, d_out]` that bitsandbytes stores as `name [d_out, d_in]`.

    Args:
      tensors: a state dict with `name` and the tensors beside it; others are ignored.
      name: the prefix of `.absmax`.

    Raises:
      ValueError: for a tensor that is missing or has the wrong number of entries, a codebook other
        than the format's, or rows that are no multiple of the block size.
    """
    quant_type, state = quant_state(tensors, name)
    d_out, d_in = state["shape"]
    block_size = state["blocksize"]
    if d_in % block_size:
        raise ValueError(
            f"{name}: blocks of {block_size} run across its rows of {d_in}, which a matrix that is "
            "decoded by columns cannot keep. Dequantise it with bitsandbytes, and quantise it here."
        )
    format_class = _FORMATS[quant_type]
    _check_codebook(tensors, f"{name}.quant_map", format_class.codebook)
    codes = _part(tensors, name, d_out * d_in // 2, np.uint8)
    blocks = d_out * d_in // block_size
    if "nested_offset" in state:
        _check_codebook(tensors, f"{name}.nested_quant_map", codebooks.DYNAMIC8)
        if (nested := state.get("nested_blocksize")) != NESTED_BLOCK:
            raise ValueError(f"{name}: nested blocks of {nested}, expected {NESTED_BLOCK}.")
        nested = -(-blocks // NESTED_BLOCK)
        absmax: Any = DoubleQuantized(
            codes=_transposed(_part(tensors, f"{name}.absmax", blocks, np.uint8), d_out),
            scale=jnp.asarray(_part(tensors, f"{name}.nested_absmax", nested, np.float32)),
            offset=jnp.float32(state["nested_offset"]),
        )
    else:
        absmax = _transposed(_part(tensors, f"{name}.absmax", blocks, np.float32), d_out)
    return format_class(
        codes=_transposed(codes, d_out),
        absmax=absmax,
        contracted=(d_in,),
        output=(d_out,),
        layout=Layout(),
        dense_dtype=jnp.dtype(state["dtype"]),
    )


def to_bitsandbytes(weight: Quantized, name: str = "weight") -> dict[str, np.ndarray]:
    """The inverse: the tensors of one layer's NF4 or FP4 weight, `name` and those beside it.

    Raises:
      ValueError: for another format, or stacked layers.
    """
    if not isinstance(weight, NF4 | FP4):
        raise ValueError(f"bitsandbytes has no {type(weight).__name__} weights; expected NF4, FP4.")
    if weight.codes.ndim != 2:
        raise ValueError(
            f"{weight} is stacked: convert it layer by layer, jax.tree.map(lambda x: x[i], weight)."
        )
    state: dict[str, Any] = {
        "quant_type": weight.format,
        "blocksize": weight.block_size,
        "dtype": np.dtype(weight.dtype).name,
        "shape": [math.prod(weight.output), math.prod(weight.contracted)],
    }
    absmax = weight.absmax
    tensors = {name: _flat(weight.codes)[:, None], f"{name}.quant_map": weight.codebook + 0}
    if isinstance(absmax, DoubleQuantized):
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        state["nested_offset"] = float(absmax.offset)
        tensors[f"{name}.absmax"] = _flat(absmax.codes)
        tensors[f"{name}.nested_absmax"] = np.asarray(absmax.scale)
        tensors[f"{name}.nested_quant_map"] = codebooks.DYNAMIC8.copy()
    else:
        tensors[f"{name}.absmax"] = _flat(absmax)
    encoded = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {**tensors, f"{name}.{_STATE}{weight.format}": encoded.copy()}


def quant_state(tensors: Mapping[str, np.ndarray], name: str) -> tuple[str, dict[str, Any]]:
    """The format of the weight `name`, and its `quant_state`.

    Raises:
      ValueError: for a state that is missing or corrupt.
    """
    for quant_type in _FORMATS:
        key = f"{name}.{_STATE}{quant_type}"
        if key in tensors:
            return quant_type, _parsed(np.asarray(tensors[key]).tobytes(), key)
    raise ValueError(
        f"{name} has no {name}.{_STATE}nf4 (or fp4) beside it: it is no 4-bit weight of "
        "bitsandbytes, or its state dict is incomplete."
    )


def _parsed(packed: bytes, key: str) -> dict[str, Any]:
    try:
        state = json.loads(packed)
    except (ValueError, RecursionError):
        state = None
    known = isinstance(state, dict) and (
        isinstance(shape := state.get("shape"), list)
        and len(shape) == 2
        and all(type(size) is int and 0 < size <= _LARGEST for size in shape)
        and type(block := state.get("blocksize")) is int
        and 0 < block <= _LARGEST
        and block % 2 == 0
        and state.get("dtype") in ("float32", "bfloat16", "float16")
        and (type(state.get("nested_offset", 0.0)) is float)
        and abs(state.get("nested_offset", 0.0)) <= float(np.finfo(np.float32).max)
    )
    if not known:
        raise ValueError(
            f"{key} is corrupt: expected JSON of a shape [out, in], an even blocksize, a float "
            "dtype, and of double quantisation a finite nested_offset."
        )
    return state


def _part(
    tensors: Mapping[str, np.ndarray], name: str, count: int, dtype: type[np.generic]
) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"the state dict lacks {name}, which the quant_state asks for.")
    found = np.asarray(tensors[name])
    if found.dtype != dtype or found.size != count:
        raise ValueError(
            f"{name} holds {found.size} entries of {found.dtype}, expected {count} of "
            f"{np.dtype(dtype)}: the tensor and its quant_state belong to different weights."
        )
    return found.reshape(-1)


def _check_codebook(tensors: Mapping[str, np.ndarray], name: str, codebook: np.ndarray) -> None:
    found = _part(tensors, name, codebook.size, np.float32)
    if not np.array_equal(found, codebook):
        raise ValueError(f"{name} is not the codebook of this format: expected {codebook[:4]}...")


def _transposed(flat: np.ndarray, d_out: int) -> Any:
    return jnp.asarray(np.ascontiguousarray(flat.reshape(d_out, -1).T))


def _flat(matrix: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(matrix).T).reshape(-1)
