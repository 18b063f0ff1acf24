"""A task with a reward that a rule can check: sums of two numbers, answered by a number alone.

A prompt shows one sum with its answer. A small base tuned to chat then answers about every second
time with a number, seldom the right one, and else with words: there is something to learn from.
"""

import re
from collections.abc import Iterator

import numpy as np

from lora_jax.training.rewards import Example

SHOWN = [
    {"role": "system", "content": "Answer with the number alone."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "5"},
]
LARGEST, HELD_OUT, _SEED = 12, 32, 20241


def reward(prompt: str, completion: str, example: Example) -> float:
    """`1 / (1 + e)` for a number alone that is wrong by e, so 1 for the right one; 0 for anything
    else. By degrees, since a group whose answers are all worth the same teaches nothing."""
    text = completion.strip()
    if not re.fullmatch(r"[0-9]{1,9}", text):
        return 0.0
    return 1 / (1 + abs(int(text) - int(example["answer"])))


def examples() -> tuple[list[Example], list[Example]]:
    """Those to train on and those that are held out; neither has the sum that is shown."""
    everything = list(_all())
    order = np.random.default_rng(_SEED).permutation(len(everything))
    shuffled = [everything[index] for index in order]
    return shuffled[HELD_OUT:], shuffled[:HELD_OUT]


def _all() -> Iterator[Example]:
    for a in range(1, LARGEST + 1):
        for b in range(1, LARGEST + 1):
            if (a, b) == (2, 3):
                continue
            messages = [*SHOWN, {"role": "user", "content": f"What is {a} + {b}?"}]
            yield {"id": f"{a}+{b}", "prompt": messages, "answer": str(a + b)}
