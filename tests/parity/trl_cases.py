"""Pairs, adapters and losses that trl and we both compute, drawn by numpy: see small_llamas.py."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "interop"))

import small_llamas

CASES = {
    "dpo": {"beta": 0.3},
    "dpo_smoothed": {"beta": 0.5, "label_smoothing": 0.1},
    "dpo_norm": {"beta": 4.0},
    "ipo": {"beta": 0.4},
    "kto": {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.8},
    "simpo": {"beta": 2.0, "gamma": 0.7},
    "orpo": {"beta": 0.5},
}
MODEL = "smollm2"
ADAPTER = {"model": MODEL, "rank": 2, "alpha": 4, "rslora": False,
           "targets": ["q_proj", "v_proj", "down_proj"]}  # fmt: skip
LEARNING_RATE, STEPS, ROWS = 0.05, 5, 4  # of plain SGD
VOCABULARY = small_llamas.VARIANTS[MODEL]["vocab_size"]
EOS = VOCABULARY - 1


def pairs() -> list[dict[str, list[int]]]:
    """A prompt and two answers for each row of every step; answers end with EOS."""
    words = np.random.Philox(11)

    def draw(least, most):
        count = least + int(words.random_raw()) % (most - least + 1)
        return [int(word % np.uint64(EOS)) for word in words.random_raw(count)]

    return [
        {"prompt": draw(3, 6), "chosen": [*draw(2, 8), EOS], "rejected": [*draw(2, 8), EOS]}
        for _ in range(ROWS * STEPS)
    ]


def judged() -> list[dict]:
    """For KTO: the chosen answer of every other pair and the rejected one of the rest."""
    return [
        {"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
        for i, p in enumerate(pairs())
        for side in [("chosen", "rejected")[i % 2]]
    ]


def rollouts() -> dict[str, np.ndarray]:
    """Log-probabilities of twelve answers, in groups of three, under policy, sampler and reference,
    and their advantages."""
    words, shape = np.random.Philox(13), (12, 7)

    def draw(*shape):
        raw = words.random_raw(int(np.prod(shape))).reshape(shape)
        return (raw >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)

    policy = -4 * draw(*shape)
    lengths = 1 + words.random_raw(12) % np.uint64(7)
    return {
        "policy": policy,
        "sampler": policy + 0.8 * draw(*shape) - np.float32(0.4),
        "reference": policy + draw(*shape) - np.float32(0.5),
        "mask": np.arange(7)[None] < lengths[:, None],
        "advantages": 2 * draw(12) - 1,
        "rewards": np.where(draw(4, 3) < 0.2, np.nan, draw(4, 3)).astype(np.float32),
        "beta": np.float32(0.3),
    }
