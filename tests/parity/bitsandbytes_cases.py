"""The tensors that bitsandbytes and we both quantise, drawn by numpy's raw words."""

import numpy as np

BLOCK = 64
COUNTS = {"ragged": 5 * BLOCK + 2, "nested": 260 * BLOCK}  # the latter ends in a short nested block


def draw(seed: int, count: int) -> np.ndarray:
    """Roughly normal: sums of four uniform numbers, exact in float32."""
    words = np.random.Philox(seed).random_raw(count)
    parts = words[:, None] >> np.array([0, 16, 32, 48], np.uint64) & np.uint64(0xFFFF)
    return (parts.astype(np.int64).sum(1) - 2 * 0xFFFF).astype(np.float32) / np.float32(1 << 15)


def tensors() -> dict[str, np.ndarray]:
    """One flat float32 tensor a case; 12 blocks unless the case is about length."""
    x = draw(0, 12 * BLOCK)
    powers = np.random.Philox(1).random_raw(x.size) % np.uint64(70)
    spread = x * np.float32(10) ** (powers.astype(np.float32) - np.float32(42))
    zero_block = x.copy()
    zero_block[BLOCK : 2 * BLOCK] = 0
    levels = np.linspace(-1, 1, x.size, dtype=np.float32)
    return {
        "random": x,
        **{name: draw(2 + i, count) for i, (name, count) in enumerate(COUNTS.items())},
        "zero": np.zeros_like(x),
        "zero_block": zero_block,
        "denormal": x * np.float32(1e-40),
        "near_denormal": x * np.float32(1e-37),
        "huge": x * np.float32(1e35),
        "largest": levels * np.float32(3.4e38),
        "constant": np.full_like(x, 0.37),
        "spread": spread,
        "levels": levels,
    }


OVERFLOWING = ("largest",)  # whose absmax has no float32 sum, so that nothing can be subtracted
CASES = [
    (name, quant_type, double_quant)
    for name in tensors()
    for quant_type in ("nf4", "fp4")
    for double_quant in (False, True)
    if not (double_quant and name in OVERFLOWING)
]


def case_id(case: tuple) -> str:
    name, quant_type, double_quant = case
    return f"{name}-{quant_type}" + ("-double" if double_quant else "")
