"""The adapters that PEFT and we both compute, drawn by numpy: see tests/interop/small_llamas.py."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "interop"))

import small_llamas

CASES = {
    "qv": {"model": "llama3_1", "rank": 4, "alpha": 8, "rslora": False,
           "targets": ["q_proj", "v_proj"]},
    "all_linear_rslora": {"model": "smollm2", "rank": 2, "alpha": 3, "rslora": True,
                          "targets": ["q_proj", "k_proj", "v_proj", "o_proj",
                                      "gate_proj", "up_proj", "down_proj"]},
}  # fmt: skip
LEARNING_RATE, WEIGHT_DECAY, STEPS = 1e-3, 0.01, 3
TOKENS = small_llamas.TOKENS


def adapters(case: dict) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`{module: (A [r, in], B [out, r])}` in PEFT's orientation, B not zero."""
    config = small_llamas.VARIANTS[case["model"]]
    words, found = np.random.Philox(7), {}

    def draw(*shape):
        raw = words.random_raw(int(np.prod(shape))).reshape(shape)
        unit = (raw >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)
        return unit * np.float32(0.2)

    for name, shape in small_llamas.weight_shapes(config).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in case["targets"]:
            found[module] = draw(case["rank"], shape[1]), draw(shape[0], case["rank"])
    return found
