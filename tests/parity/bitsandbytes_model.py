"""What bitsandbytes' CPU build makes of a tensor, for the golden file and for the live test."""

import bitsandbytes
import bitsandbytes.functional as bnb
import numpy as np
import torch

VERSION = bitsandbytes.__version__


def compute(x: np.ndarray, quant_type: str, double_quant: bool) -> dict[str, np.ndarray]:
    """Packed codes, absmax or its codes, scales and offset, and the dequantised values."""
    packed, state = bnb.quantize_4bit(
        torch.from_numpy(x), quant_type=quant_type, compress_statistics=double_quant
    )
    found = {"codes": packed[:, 0], "absmax": state.absmax}
    if double_quant:
        found |= {"scale": state.state2.absmax, "offset": state.offset}
    found["values"] = bnb.dequantize_4bit(packed, state).reshape(-1)
    return {name: tensor.numpy() for name, tensor in found.items()}


def state_dict(w: np.ndarray, quant_type: str, double_quant: bool, dtype="float32"):
    """The serialised tensors of a matrix `[out, in]`, and its dequantised values in float32."""
    packed, state = bnb.quantize_4bit(
        torch.from_numpy(w).to(getattr(torch, dtype)),
        quant_type=quant_type,
        compress_statistics=double_quant,
    )
    tensors = {
        "weight": packed,
        **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()},
    }
    values = bnb.dequantize_4bit(packed, state).float().numpy()
    return {name: tensor.numpy() for name, tensor in tensors.items()}, values


def dequantize(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """What bitsandbytes reads in such tensors, in float32."""
    parts = {k.removeprefix("weight."): torch.tensor(v) for k, v in tensors.items()}
    packed = parts.pop("weight")
    state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
    return bnb.dequantize_4bit(packed, state).float().numpy()
