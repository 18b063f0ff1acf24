"""A task with a reward that a rule can check: sums of two numbers, answered by a number alone.

A base that was tuned to chat answers in sentences, so there is much to learn, and now and then with
a number, so there is something to learn from.
"""

import re
from collections.abc import Iterator

import numpy as np

from lora_jax.training.rewards import Example

SYSTEM = "Answer with the number alone."
LARGEST, HELD_OUT, _SEED = 12, 32, 20241
BEGINS, ALONE, RIGHT = 0.25, 0.5, 1.0


def reward(prompt: str, completion: str, example: Example) -> float:
    """1 for the right number and nothing else, 0.5 for another one, 0.25 for an answer that begins
    with a number, else 0."""
    text = completion.strip()
    if text == example["answer"]:
        return RIGHT
    if re.fullmatch(r"\d+", text):
        return ALONE
    return BEGINS if re.match(r"\d", text) else 0.0


def examples() -> tuple[list[Example], list[Example]]:
    """Those to train on and those that are held out; no sum is in both."""
    everything = list(_all())
    order = np.random.default_rng(_SEED).permutation(len(everything))
    shuffled = [everything[index] for index in order]
    return shuffled[HELD_OUT:], shuffled[:HELD_OUT]


def _all() -> Iterator[Example]:
    for a in range(1, LARGEST + 1):
        for b in range(1, LARGEST + 1):
            messages = [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": f"What is {a} + {b}?"},
            ]
            yield {"id": f"{a}+{b}", "prompt": messages, "answer": str(a + b)}
