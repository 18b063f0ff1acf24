"""The codebooks: the value of each code, scaled to a largest magnitude of 1."""

import numpy as np

from lora_jax.kernels.nf4_matmul.reference import CODEBOOK

NF4 = CODEBOOK

# A sign, two bits of exponent and one of mantissa, as the QLoRA paper's FP4 and OCP's MX formats
# (Rouhani et al. 2023, arXiv:2310.10537) have it.
_E2M1_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32) / np.float32(6)
E2M1 = np.concatenate([_E2M1_MAGNITUDES, -_E2M1_MAGNITUDES])

# What bitsandbytes calls FP4, in the order of its bits: the same but for a far smaller subnormal.
_FP4_MAGNITUDES = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
FP4 = np.concatenate([_FP4_MAGNITUDES, -_FP4_MAGNITUDES])

# Even steps; the lowest code is below -1 and never chosen.
INT4 = np.arange(-8, 8, dtype=np.float32) / np.float32(7)
INT8 = np.arange(-128, 128, dtype=np.float32) / np.float32(127)


def _dynamic_map() -> np.ndarray:
    """Seven decades, each cut into twice the steps of the one below it, with both signs.

    Source: Dettmers 2015, arXiv:1511.04561, section 2.
    """
    magnitudes = []
    for exponent in range(7):
        edges = _even_steps(np.float32(0.1), np.float32(1), 2**exponent)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        magnitudes.append(np.float32(10.0 ** (exponent - 6)) * means)
    positive = np.concatenate(magnitudes)
    return np.sort(np.concatenate([-positive, positive, np.array([0, 1], np.float32)]))


def _even_steps(first: np.float32, last: np.float32, count: int) -> np.ndarray:
    """`count` steps, each edge rounded once and counted from the nearer end, as in torch."""
    step, index = np.float64((last - first) / np.float32(count)), np.arange(count + 1)
    from_first, from_last = first + step * index, last - step * (count - index)
    return np.where(index < (count + 1) // 2, from_first, from_last).astype(np.float32)


DYNAMIC8 = _dynamic_map()
