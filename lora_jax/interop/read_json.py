"""Reads JSON files of unknown origin."""

import json
from pathlib import Path


def read_json(path: Path) -> dict:
    """The object in a JSON file; an empty one if there is no such file.

    Raises:
      ValueError: the file is not JSON, holds no object, or nests too deep.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is not what it should be: it nests too deep.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object.")
    return value
