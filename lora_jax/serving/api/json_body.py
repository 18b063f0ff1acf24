"""Parses untrusted JSON: valid UTF-8, finite numbers, no lone surrogates, one object."""

import json
import math
from typing import Any, NoReturn

from lora_jax.serving.api.errors import ApiError, invalid, shown


def parse(body: bytes) -> dict[str, Any]:
    """The object in `body`.

    Raises:
      ApiError: 400 for what is not UTF-8, not JSON, not an object; for NaN and Infinity, numbers
        that overflow, lone surrogates, and nesting that is too deep.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid(None, f"The body is not UTF-8: {error}.", "invalid_json") from None
    try:
        value = json.loads(text, parse_constant=_not_a_number, parse_float=_finite)
        if "\\u" in text:  # all other text was checked when it was decoded
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        message = "The body has half of a surrogate pair, which is no character."
        raise invalid(None, message, "invalid_json") from None
    except RecursionError:
        raise invalid(None, "The body nests too deep.", "invalid_json") from None
    except ValueError as error:  # of a number with thousands of digits too
        raise invalid(None, f"The body is not JSON: {error}.", "invalid_json") from None
    if not isinstance(value, dict):
        raise invalid(None, f"The body is {shown(value)}, expected a JSON object.", "invalid_json")
    return value


def _not_a_number(name: str) -> NoReturn:
    raise ApiError(400, f"The body has {name}, which JSON has not.", code="invalid_json")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        message = f"The body has the number {text[:40]}, which is too large."
        raise ApiError(400, message, code="invalid_json")
    return number
