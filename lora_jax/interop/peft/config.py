"""adapter_config.json: the settings of an adapter of PEFT."""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lora_jax.interop.peft.patterns import matching

_LARGEST = 1 << 31


@dataclasses.dataclass(frozen=True)
class Allowed:
    """The values that a field of the config may have; null is always one.

    Attributes:
      fits: whether a value is one.
      refusal: the sentence on another, with places for `{field}` and `{value}`.
    """

    fits: Callable[[Any], bool]
    refusal: str

    @classmethod
    def expected(cls, fits: Callable[[Any], bool], what: str) -> "Allowed":
        return cls(fits, f"{{field}} is {{value}}, expected {what}.")


def one_of(*values: str) -> Allowed:
    return Allowed.expected(lambda value: value in values, f"one of {', '.join(values)}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_LARGEST < value < _LARGEST


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _are_numbers(value: Any) -> bool:
    return not value or (isinstance(value, dict) and all(map(_is_number, value.values())))


NUMBER = Allowed.expected(_is_number, "a number")
COUNT = Allowed.expected(_is_count, "a count")
NUMBERS = Allowed.expected(_are_numbers, "an object of numbers")
SWITCH = Allowed.expected(lambda value: isinstance(value, bool), "true or false")
# Of an option that changes what an adapter computes, and that our method does not have.
UNSUPPORTED = Allowed(lambda value: not value, "{field}={value} is not supported.")


def check_values(source: str, config: Mapping[str, Any], values: Mapping[str, Allowed]) -> None:
    """Raises ValueError for a value that its field may not have."""
    for field, allowed in values.items():
        value = config.get(field)
        if value is not None and not allowed.fits(value):
            refusal = allowed.refusal.format(field=field, value=f"{value!r:.200}")
            raise ValueError(f"{source}: {refusal}")


def pattern_values(
    source: str, config: Mapping[str, Any], field: str, modules: Iterable[str], default: Any
) -> dict[str, Any]:
    """The value of rank_pattern or alpha_pattern for each module: that of the first key that
    matches its end."""
    modules, pattern = list(modules), config.get(field) or {}
    expressions = [rf"(.*\.)?({key})" for key in pattern]
    values = dict.fromkeys(modules, default)
    found = matching(f"{source}: {field}", expressions, modules)
    for matched, value in reversed(list(zip(found, pattern.values(), strict=True))):
        values |= dict.fromkeys(matched, value)
    return values


def as_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One value for each module, as a default and a pattern for those that differ.

    Raises:
      ValueError: where there is no module.
    """
    if not values:
        raise ValueError("the delta adapts nothing: every layer's scale is zero.")
    default, _ = collections.Counter(values.values()).most_common(1)[0]
    return default, {re.escape(m): v for m, v in values.items() if v != default}


def target_modules(adapted: list[str], known: list[str]) -> list[str]:
    """The shortest list that PEFT reads as exactly these modules: suffixes, where all modules with
    that suffix are adapted, or whole names."""
    found = set()
    for module in adapted:
        suffix = module.rpartition(".")[2]
        alike = {name for name in known if name.rpartition(".")[2] == suffix}
        found.add(suffix if alike <= set(adapted) else module)
    return sorted(found)
