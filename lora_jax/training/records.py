"""A run's folder: its config, and its metrics, a JSON line each."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CONFIG = "config.json"


def claim(workdir: Path, config: Mapping[str, Any]) -> None:
    """Makes `workdir` this run's, by writing its config there.

    Raises:
      ValueError: if it holds another run, naming what differs.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / CONFIG
    ours = flat(json.loads(json.dumps(config)))
    if path.exists():
        theirs = flat(json.loads(path.read_text()))
        names = sorted({*ours, *theirs})
        differing = [name for name in names if ours.get(name) != theirs.get(name)]
        if differing:
            shown = ", ".join(
                f"{name} ({theirs.get(name)!r} there, {ours.get(name)!r} here)"
                for name in differing[:5]
            )
            raise ValueError(
                f"{workdir} holds another run, which differs in {shown}. Choose another --workdir, "
                "or repeat that run's command to continue it."
            )
        return
    write_json(path, config)


def write_json(path: Path, value: Any) -> None:
    """Writes readable JSON, completely or not at all."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n")
    os.replace(partial, path)


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a line to a file of JSON lines."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of such a file; a last line that was cut off in writing is no record."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def rewind(path: Path, arms: list[str], step: int) -> None:
    """Drops what these arms logged after `step`, from which they resume."""
    kept = [r for r in read(path) if r.get("arm") not in arms or r["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
    os.replace(partial, path)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by their dotted names."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {
        name: leaf
        for key, value in tree.items()
        for name, leaf in flat(value, f"{prefix}.{key}" if prefix else key).items()
    }
