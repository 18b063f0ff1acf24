"""Rewards as plain functions, and what happens where one fails."""

import logging
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

_logger = logging.getLogger(__name__)
Example = Mapping[str, Any]
Reward = Callable[[str, str, Example], float]  # (prompt, completion, example)
OnError = Literal["stop", "skip"]


def scored(
    reward: Reward,
    prompts: Sequence[str],
    completions: Sequence[str],
    examples: Sequence[Example],
    *,
    on_error: OnError = "stop",
) -> np.ndarray:
    """The reward of each completion, float64.

    Args:
      reward: `(prompt, completion, example) -> float`.
      prompts, completions, examples: of each completion.
      on_error: what a reward that raises, or returns no finite number, does: "stop" ends the run,
        "skip" makes it NaN, which counts for nothing, and logs it.

    Raises:
      ValueError: naming the example, where a reward fails and `on_error` is "stop", or where every
        one does.
    """
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error={on_error!r}: expected stop or skip.")
    found, failures = [], []
    for index, given in enumerate(zip(prompts, completions, examples, strict=True)):
        value, failure = _call(reward, *given)
        found.append(value)
        if failure is None:
            continue
        failures.append(_named(index, failure, *given))
        if on_error == "stop":
            raise ValueError(f"{failures[0]} on_error='skip' leaves such answers out.")
        _logger.warning("%s It is left out.", failures[-1])
    if failures and len(failures) == len(found):
        raise ValueError(f"No reward of {len(found)} succeeded: {failures[0]}")
    return np.array(found, np.float64)


def _call(reward: Reward, prompt: str, completion: str, example: Example):
    try:
        value = reward(prompt, completion, example)
    except Exception as error:  # a reward may raise anything that Python can
        return math.nan, f"raised {type(error).__name__}: {error}"
    if not isinstance(value, numbers.Real | np.ndarray) or np.ndim(value):
        return math.nan, f"returned {value!r}, expected a number"
    if not math.isfinite(value):
        return math.nan, f"returned {value}, expected a finite number"
    return float(value), None


def _named(index: int, failure: str, prompt: str, completion: str, example: Example) -> str:
    what = example.get("id", f"of answer {index}")
    return (
        f"the reward of example {what}, prompt {_end(prompt)!r}, completion {completion[:60]!r}, "
        f"{failure}."
    )


def _end(prompt: str) -> str:
    return prompt if len(prompt) <= 80 else f"...{prompt[-80:]}"
