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


def reward(prompt: str, completion: str, example: Example) -> float:
    """1 for the right number and nothing else; else half of the share of digits among the
    characters: 0.5 for another number, 0.33 for "5 + 7 = 12", 0 for words alone. By steps instead
    of a share, all answers of a group soon stand on one, and there is nothing to go up by."""
    text = "".join(completion.split())
    if completion.strip() == example["answer"]:
        return 1.0
    return 0.5 * len(re.findall(r"[0-9]", text)) / max(len(text), 1)


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
