"""Tensors of a GGUF file, dequantised."""

import dataclasses
import math
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from lora_jax.interop.gguf_header import TensorInfo
from lora_jax.interop.model_tensors import leaves_of, names_of
from lora_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A vector or a matrix in the file at `path`; indexing it by slices reads those rows.

    `rows`, where given, is the order in which to return the rows; `added` is what the file's values
    have more than those that are returned.
    """

    path: Path
    name: str
    info: TensorInfo
    rows: np.ndarray | None = None
    added: float = 0.0

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        if len(self.info.shape) == 1:
            vector = self._read(0, 1)[0]
            return (vector if self.rows is None else vector[self.rows])[index]
        rows, columns = index
        stored = np.arange(self.info.shape[0]) if self.rows is None else self.rows
        stored = stored[rows]
        first = int(stored.min())
        read = self._read(first, int(stored.max()) + 1)
        return (read if self.rows is None else read[stored - first])[:, columns]

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` in the file's order, float32; a vector is one row."""
        block, block_bytes = GGML_QUANT_SIZES[self.info.kind]
        row_bytes = self.info.shape[-1] // block * block_bytes
        data = np.fromfile(
            self.path,
            np.uint8,
            count=(stop - start) * row_bytes,
            offset=self.info.offset + start * row_bytes,
        )
        # gguf walks sixteen rows at a time in Python; few long rows halve the time.
        groups = math.gcd(stop - start, 64)
        try:
            tensor = dequantize(data.reshape(groups, -1), self.info.kind)
        except NotImplementedError:
            raise ValueError(
                f"{self.path}: the tensor {self.name!r} is of type {self.info.kind.name}, which "
                "the gguf package cannot dequantise; convert the model to F16, Q8_0 or Q4_K."
            ) from None
        if not np.isfinite(tensor).all():
            raise ValueError(
                f"{self.path} is corrupt: the tensor {self.name!r} holds NaN or infinity."
            )
        tensor = tensor.reshape(stop - start, -1)
        return tensor - np.float32(self.added) if self.added else tensor


def added_values(config: DecoderConfig) -> dict[str, float]:
    """What a file's values have more than ours, by the names of those tensors."""
    return {
        name: leaf.gguf_added
        for leaf in leaves_of(config, "gguf")
        for name in names_of(leaf, "gguf", config.num_layers)
        if leaf.gguf_added
    }


def permuted_rows(config: DecoderConfig) -> dict[str, np.ndarray]:
    """Where llama.cpp stores the rows of our queries and keys, by the names of those tensors.

    In some architectures its RoPE rotates neighbours, (pair, half), where ours rotates halves,
    (half, pair).
    """
    gguf = config.family.gguf
    if gguf is None or gguf.architecture_of(config) not in gguf.interleaved:
        return {}
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    rows = {name: np.arange(n * config.head_dim).reshape(n, -1, 2) for name, n in heads.items()}
    return {name: stored.swapaxes(1, 2).ravel() for name, stored in rows.items()}
