"""Tensors of a GGUF file, dequantised."""

import math
from pathlib import Path

import numpy as np
from gguf.quants import dequantize

from lora_jax.interop.gguf_header import TensorInfo


def read_tensor(path: Path, name: str, info: TensorInfo) -> np.ndarray:
    data = np.fromfile(path, np.uint8, count=info.num_bytes, offset=info.offset)
    # gguf walks sixteen rows at a time in Python; few long rows halve the time.
    rows = math.gcd(math.prod(info.shape[:-1]), 64)
    try:
        tensor = dequantize(data.reshape(rows, -1), info.kind).reshape(info.shape)
    except NotImplementedError:
        raise ValueError(
            f"{path}: the tensor {name!r} is of type {info.kind.name}, which the gguf package "
            "cannot dequantise; convert the model to F16, Q8_0 or Q4_K."
        ) from None
    if not np.isfinite(tensor).all():
        raise ValueError(f"{path} is corrupt: the tensor {name!r} holds NaN or infinity.")
    return tensor
