"""What a loss is told beside its batch, by name: of a sweep, each arm may have its own."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from lora_jax.paths import described, is_known
from lora_jax.transform import delta_nodes


class Setting(Protocol):
    """One of them.

    Attributes:
      value: where none is given.
    """

    @property
    def value(self) -> Any: ...

    def checked(self, shown: str, value: Any) -> Any:
        """The value as arrays. Raises ValueError, which begins with `shown`, its `{}` the value."""
        ...


@dataclasses.dataclass(frozen=True)
class Number:
    """A number in a range.

    Attributes:
      value: where none is given.
      least, most: of the range.
      above: whether `least` itself is outside.
    """

    value: float
    least: float = -math.inf
    most: float = math.inf
    above: bool = False

    def checked(self, shown: str, value: Any) -> jax.Array:
        dtype = getattr(value, "dtype", type(value))
        if jnp.ndim(value) or dtype is str or not jnp.issubdtype(dtype, jnp.number):
            raise ValueError(f"{shown.format(described(value))}: expected {self}.")
        if is_known(value) and not self._holds(float(value)):
            raise ValueError(f"{shown.format(value)}: expected {self}.")
        return jnp.asarray(value, jnp.float32)

    def _holds(self, value: float) -> bool:
        within = self.least <= value <= self.most and math.isfinite(value)
        return within and not (self.above and value == self.least)

    def __str__(self) -> str:
        if self.most < math.inf:
            return f"a number from {self.least:g} to {self.most:g}"
        return f"a number {'above' if self.above else 'of at least'} {self.least:g}"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter of the same base; by default none, which is the base itself."""

    value: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def checked(self, shown: str, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError(
                f"{shown.format(type(value).__name__)}: expected a delta, what lora_transform "
                "returns second, or {} for the base."
            )
        delta_nodes(value)
        return value


Settings = Mapping[str, Setting]


def checked(owner: str, settings: Settings, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, as arrays.

    Raises:
      ValueError: for a name that the owner does not have, or a value that it does not take.
    """
    for name in given:
        if name not in settings:
            names = ", ".join(settings) or "none"
            raise ValueError(f"{owner} has no setting {name!r}; it has {names}.")
    return {
        name: settings[name].checked(f"{owner}: {name}={{}}", value)
        for name, value in given.items()
    }


def defaults(owner: str, settings: Settings) -> Settings:
    """The settings themselves. Raises ValueError, naming the maker of a loss and its argument, for
    one that does not take its own value."""
    for name, setting in settings.items():
        setting.checked(f"{owner}({name}={{}})", setting.value)
    return settings
