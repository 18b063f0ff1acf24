"""The fields of a body, each read once and checked; those that are not read are refused."""

from collections.abc import Iterable, Mapping
from typing import Any

from lora_jax.serving.api.errors import ApiError, invalid, shown


class Fields:
    """A body's fields; null is the same as absent.

    Each reader raises `ApiError` 400 that names the field, what was found and what was expected.
    """

    def __init__(self, body: Mapping[str, Any]):
        self._left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str) -> Any:
        return self._left.pop(name, None)

    def text(self, name: str) -> str:
        value = self.take(name)
        if value is None:
            raise invalid(
                name, f"{name} is missing, expected a text.", "missing_required_parameter"
            )
        if not isinstance(value, str) or not value:
            raise _unexpected(name, value, "a text that is not empty")
        return value

    def boolean(self, name: str) -> bool:
        value = self.take(name)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise _unexpected(name, value, "true or false")

    def integer(self, name: str, low: int, high: int, default: Any = None) -> Any:
        value = self.take(name)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise _unexpected(name, value, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self.take(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not low <= value <= high:
            raise _unexpected(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """One text or a list of them."""
        value = self.take(name)
        if value is None:
            return ()
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or len(texts) > most:
            raise _unexpected(name, value, f"a text or a list of at most {most}")
        for index, text in enumerate(texts):
            if not isinstance(text, str) or not text:
                raise _unexpected(f"{name}[{index}]", text, "a text that is not empty")
        return tuple(texts)

    def finish(self, neutral: Mapping[str, tuple], harmless: Iterable[str]) -> None:
        """Refuses what is left, but fields at values that change nothing, and `harmless` ones."""
        ignored = frozenset(harmless)
        for name, value in self._left.items():
            if name in ignored or value in neutral.get(name, ()):
                continue
            if name not in neutral:
                message = f"Unknown field {shown(name)}: check its spelling, or leave it out."
                raise invalid(name[:80], message, "unknown_parameter")
            raise _unsupported(name, neutral[name])


def _unsupported(name: str, neutral: tuple) -> ApiError:
    values = " or ".join(_plain(value) for value in neutral)
    out = f"leave it out, or give {values}" if neutral else "leave it out"
    return invalid(name, f"{name} is not supported by this server: {out}.", "unsupported_parameter")


def _plain(value: Any) -> str:
    if isinstance(value, list | dict):
        return str(value).replace("'", '"')
    return shown(value)


def _unexpected(name: str, value: Any, expected: str) -> ApiError:
    return invalid(name, f"{name} is {shown(value)}, expected {expected}.")
