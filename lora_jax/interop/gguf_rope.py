"""RoPE's scaling from and to a GGUF file, which has keys for some and tensors for others."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.interop.gguf_header import Header
from lora_jax.interop.gguf_tensors import StoredTensor
from lora_jax.interop.model_tensors import FileTensor
from lora_jax.models.config import DecoderConfig
from lora_jax.models.rope_scaling import (
    LinearScaling,
    LongRopeScaling,
    RopeScaling,
    Scaling,
    YarnScaling,
    longrope_amplitude,
    yarn_amplitude,
)

_LLAMA3, _LONG, _SHORT = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
ROPE_TENSORS = (_LLAMA3, _LONG, _SHORT)
_ORIGINAL = "rope.scaling.original_context_length"


def scaling_from_gguf(
    path: Path, header: Header, theta: float, dims: int, context: int
) -> Scaling | None:
    """The scaling of a file's RoPE of `dims` dimensions.

    Raises:
      ValueError: for one that llama.cpp would not read, or that cannot be told from the file.
    """
    name = header.metadata["general.architecture"]
    own = {
        key.removeprefix(f"{name}."): value
        for key, value in header.metadata.items()
        if key.startswith(f"{name}.rope.")
    }
    original = own.get(_ORIGINAL)
    if original is not None and (type(original) is not int or original < 1):
        raise ValueError(f"{path}: {name}.{_ORIGINAL} is {original!r}, expected a positive int.")
    found = [tensor for tensor in ROPE_TENSORS if tensor in header.tensors]
    kind = own.get("rope.scaling.type")
    if _LLAMA3 in found:
        if name != "llama":
            raise ValueError(f"{path} holds {_LLAMA3}, which llama.cpp does not read in {name}.")
        return _llama3(path, header, theta, dims, 8192 if original is None else original)
    if found:
        return _longrope(path, header, dims, original, own, context)
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 0.0))
    if kind == "linear" and factor not in (0, 1):
        return LinearScaling(factor=float(factor))
    if kind == "yarn":
        if type(factor) is not float or not 0 < factor < math.inf or original is None:
            raise ValueError(
                f"{path}: the RoPE scaling 'yarn' has the factor {factor!r} and the original "
                f"context {original!r}; expected both."
            )
        amplitude = yarn_amplitude(factor)
        return YarnScaling(factor=factor, original_context=original, attention_factor=amplitude)
    return None


def scaling_to_gguf(
    config: DecoderConfig, architecture: str
) -> tuple[dict[str, Any], dict[str, FileTensor]]:
    """The keys, without the architecture in front, and the tensors of a model's scaling.

    Raises:
      ValueError: for a scaling that llama.cpp would not compute.
    """
    scaling = config.rope_scaling
    if scaling is None:
        return {}, {}
    if isinstance(scaling, RopeScaling) and architecture == "llama":
        divisors = rope_divisors(scaling, config.rope_theta, config.rope.dims)
        return {_ORIGINAL: scaling.original_context}, {_LLAMA3: _tensor(divisors)}
    if isinstance(scaling, LinearScaling):
        return {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}, {}
    if isinstance(scaling, YarnScaling):
        usual = YarnScaling(
            factor=scaling.factor,
            original_context=scaling.original_context,
            attention_factor=yarn_amplitude(scaling.factor),
        )
        if scaling == usual:
            keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": scaling.factor}
            return keys | {_ORIGINAL: scaling.original_context}, {}
    if isinstance(scaling, LongRopeScaling) and architecture == "phi3":
        tensors = {_LONG: scaling.long_factor, _SHORT: scaling.short_factor}
        keys = {
            "rope.scaling.attn_factor": scaling.attention_factor,
            _ORIGINAL: scaling.original_context,
        }
        return keys, {name: _tensor(np.array(x, np.float32)) for name, x in tensors.items()}
    raise ValueError(
        f"GGUF has no place for {scaling} in a {architecture}. Write a Hugging Face folder, "
        "save_huggingface(folder, model)."
    )


def rope_divisors(scaling: RopeScaling, theta: float, dims: int) -> np.ndarray:
    """What llama.cpp divides each frequency by."""
    frequencies = theta ** (-2 * np.arange(dims // 2) / dims)
    turns = scaling.original_context * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return 1.0 / ((1.0 - kept) / scaling.factor + kept)


def _llama3(path: Path, header: Header, theta: float, dims: int, original: int) -> RopeScaling:
    """Llama 3.1's scaling, from the divisors of frequencies that GGUF stores in its place.

    All released models share the low and high factors, so the largest divisor and the original
    context determine it; that the stored divisors follow from them is checked.
    """
    stored = _stored(path, header, _LLAMA3, dims)
    scaling = RopeScaling(factor=float(stored.max()), original_context=original)
    if not np.allclose(stored, rope_divisors(scaling, theta, dims), rtol=1e-4):
        raise ValueError(
            f"{path}: {_LLAMA3} does not follow Llama 3.1's rule for {scaling}; "
            "load the model from its Hugging Face folder instead, whose config.json names the rule."
        )
    return scaling


def _longrope(
    path: Path,
    header: Header,
    dims: int,
    original: int | None,
    own: Mapping[str, Any],
    context: int,
) -> LongRopeScaling:
    name = header.metadata["general.architecture"]
    if name != "phi3" or _LONG not in header.tensors or _SHORT not in header.tensors:
        raise ValueError(f"{path}: expected {_LONG} and {_SHORT} together, in a phi3 alone.")
    short, long = (_stored(path, header, tensor, dims) for tensor in (_SHORT, _LONG))
    original = context if original is None else original
    amplitude = longrope_amplitude(context / original, original)
    stored = float(own.get("rope.scaling.attn_factor", 1.0))
    return LongRopeScaling(
        short_factor=tuple(float(str(x)) for x in short),
        long_factor=tuple(float(str(x)) for x in long),
        original_context=original,
        # In float32 it is the usual one, or another.
        attention_factor=amplitude if math.isclose(stored, amplitude, rel_tol=1e-6) else stored,
    )


def _stored(path: Path, header: Header, name: str, dims: int) -> np.ndarray:
    info = header.tensors[name]
    if info.shape != (dims // 2,):
        raise ValueError(f"{path}: {name} is {info.shape}, expected ({dims // 2},).")
    return StoredTensor(path=path, name=name, info=info)[:,]


def _tensor(values: np.ndarray) -> FileTensor:
    return FileTensor(shape=values.shape, fetch=lambda: values)
