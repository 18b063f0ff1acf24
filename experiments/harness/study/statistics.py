"""Means over seeds, and which differences are larger than what seeds do."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy import stats

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean over `seeds` values and the interval that holds the true one at `LEVEL`, by Student's
    t with `seeds - 1` degrees of freedom: `mean -/+ t * s / sqrt(seeds)`."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def leaves_out_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def interval(values: Sequence[float]) -> Interval:
    """Raises ValueError for fewer than two values, which have no spread."""
    if len(values) < 2:
        raise ValueError(f"an interval needs two values or more, not {len(values)}.")
    mean, count = statistics.fmean(values), len(values)
    t = float(stats.t.ppf((1 + LEVEL) / 2, count - 1))
    half = t * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def paired(
    losses: Mapping[int, float | None], others: Mapping[int, float | None]
) -> Interval | None:
    """The interval of `losses - others` over the seeds that both have; None below two of these."""
    differences = [
        loss - other
        for seed, loss in losses.items()
        if loss is not None and (other := others.get(seed)) is not None
    ]
    return interval(differences) if len(differences) > 1 else None
