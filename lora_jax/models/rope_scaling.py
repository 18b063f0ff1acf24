"""How RoPE's frequencies are stretched beyond the context that a model was first trained on.

Sources: the papers that each class names, and transformers 5.24 for the order of roundings.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

Length = int | jax.Array  # of a row; or of the example at each position, [B, T]


def plain_frequencies(theta: float, dims: int) -> np.ndarray:
    """`theta ** (-2 i / dims)`: radians per position of each pair, `[dims / 2]`, float32."""
    return (1.0 / theta ** _exponents(dims)).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """A stretch of the frequencies.

    Attributes:
      rope_type: its name in a config.json.
      follows_length: whether the frequencies depend on how long a row is.
    """

    rope_type: ClassVar[str]
    follows_length: ClassVar[bool] = False

    @property
    def amplitude(self) -> float:
        """By which rotated queries and keys are multiplied."""
        return 1.0

    def frequencies(self, theta: float, dims: int, length: Length) -> Any:
        """`[dims / 2]`, or `[B, T, 1, dims / 2]` where they follow lengths `[B, T]`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling(Scaling):
    """Llama 3.1's stretch of the rotary frequencies (Llama 3 herd of models, section 3.4.2).

    Wavelengths longer than `original_context / low_freq_factor` are divided by `factor`, those
    shorter than `original_context / high_freq_factor` are kept, and in between the two blend.
    """

    rope_type: ClassVar[str] = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def frequencies(self, theta: float, dims: int, length: Length) -> np.ndarray:
        plain = plain_frequencies(theta, dims)
        low, high = self.low_freq_factor, self.high_freq_factor
        turns = self.original_context / (2 * math.pi / plain)
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return ((1 - keep) * plain / self.factor + keep * plain).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling(Scaling):
    """All frequencies divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    rope_type: ClassVar[str] = "linear"
    factor: float

    def frequencies(self, theta: float, dims: int, length: Length) -> np.ndarray:
        return (plain_frequencies(theta, dims) / self.factor).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicScaling(Scaling):
    """A base that grows with rows longer than `original_context`, by
    `(factor length / original_context - factor + 1) ** (dims / (dims - 2))` ("dynamic NTK")."""

    rope_type: ClassVar[str] = "dynamic"
    follows_length: ClassVar[bool] = True
    factor: float
    original_context: int

    def frequencies(self, theta: float, dims: int, length: Length) -> Any:
        exponents = _exponents(dims)
        if isinstance(length, int):
            longer: Any = max(length, self.original_context)
        else:
            longer = jnp.maximum(length, self.original_context).astype(jnp.float32)[..., None, None]
            exponents = exponents[None, None, None]
        grown = self.factor * longer / self.original_context - (self.factor - 1)
        bases = theta * grown ** (dims / (dims - 2))
        if isinstance(length, int):
            return (1.0 / bases**exponents).astype(np.float32)
        return 1.0 / jnp.exp(jnp.log(bases) * exponents)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling(Scaling):
    """YaRN (Peng et al. 2023, arXiv:2309.00071, section 3.2): pairs that turn less than `beta_slow`
    times in `original_context` are divided by `factor`, those that turn more than `beta_fast` times
    are kept, and between the two a ramp over the pairs blends them; `truncate` rounds its ends to
    whole pairs. `attention_factor` is the amplitude, `0.1 ln(factor) + 1` in the paper.
    """

    rope_type: ClassVar[str] = "yarn"
    factor: float
    original_context: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @property
    def amplitude(self) -> float:
        return self.attention_factor

    def frequencies(self, theta: float, dims: int, length: Length) -> np.ndarray:
        def pair(turns: float) -> float:
            wavelength = self.original_context / (turns * 2 * math.pi)
            return dims * math.log(wavelength) / (2 * math.log(theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        span = 0.001 if low == high else high - low
        divided = np.clip((np.arange(dims // 2, dtype=np.float32) - low) / span, 0, 1)
        plain = plain_frequencies(theta, dims)
        return (plain / self.factor * divided + plain * (1 - divided)).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeScaling(Scaling):
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): each frequency has a divisor of its own, from
    `short_factor` for rows up to `original_context`, from `long_factor` beyond. `attention_factor`
    is the amplitude."""

    rope_type: ClassVar[str] = "longrope"
    follows_length: ClassVar[bool] = True
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_context: int
    attention_factor: float

    @property
    def amplitude(self) -> float:
        return self.attention_factor

    def frequencies(self, theta: float, dims: int, length: Length) -> Any:
        powers = theta ** _exponents(dims)
        short, long = (
            (1.0 / (np.array(divisors, np.float32) * powers)).astype(np.float32)
            for divisors in (self.short_factor, self.long_factor)
        )
        if isinstance(length, int):
            return long if length > self.original_context else short
        is_long = (length > self.original_context)[..., None, None]
        shape = (*is_long.shape[:-1], dims // 2)
        chosen = [jnp.broadcast_to(f[None, None, None], shape) for f in (long, short)]
        return jnp.where(is_long, *chosen)

    def check(self, dims: int) -> None:
        """Raises ValueError unless there is a divisor for each of `dims / 2` frequencies."""
        for name, divisors in (("short", self.short_factor), ("long", self.long_factor)):
            if len(divisors) != dims // 2:
                raise ValueError(
                    f"{name}_factor of the RoPE scaling 'longrope' has {len(divisors)} numbers, "
                    f"expected {dims // 2}, one for each pair of {dims} rotated dimensions."
                )


def yarn_amplitude(factor: float, mscale: float = 0.0, mscale_all_dim: float = 0.0) -> float:
    """`0.1 ln(factor) + 1`; with both mscales, which are weights of the logarithm, the quotient."""
    if factor <= 1:
        return 1.0
    if mscale and mscale_all_dim:
        log = 0.1 * math.log(factor)
        return (mscale * log + 1) / (mscale_all_dim * log + 1)
    return 0.1 * math.log(factor) + 1


def longrope_amplitude(factor: float, original_context: int) -> float:
    """`sqrt(1 + ln(factor) / ln(original_context))`."""
    return math.sqrt(1 + math.log(factor) / math.log(original_context)) if factor > 1 else 1.0


def _exponents(dims: int) -> np.ndarray:
    return np.arange(0, dims, 2, dtype=np.float32) / dims
