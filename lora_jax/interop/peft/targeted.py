"""The modules that an adapter is on by its adapter_config.json, as PEFT reads it."""

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_jax.interop.peft.names import HEAD, TABLE, parents
from lora_jax.interop.peft.patterns import matching


def targeted(source: str, config: Mapping[str, Any], modules: Collection[str]) -> set[str]:
    """The modules that the config's method is on.

    Raises:
      ValueError: a field of another type, an invalid expression, no target_modules.
    """
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        found = {name for name in modules if _suffix(name) not in (HEAD, TABLE)}
    elif isinstance(targets, str):
        (found,) = matching(f"{source}: target_modules", [targets], modules)
    elif targets:
        ends = _names(source, config, "target_modules")
        found = {name for name in modules if _ends_in(name, ends)}
        found &= _in_layers(source, config, modules)
    else:
        raise ValueError(
            f"{source}: its config names no target_modules, so that nothing tells whether all of "
            "the adapter is there. Name them, as PEFT does when it saves."
        )
    return found - _excluded(source, config, modules)


def saved(source: str, config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, set[str]]:
    """For each name in modules_to_save, the modules that it means, with their submodules.

    PEFT takes any module whose name ends so, within a component as well: "norm" is every norm.
    """
    names = _names(source, config, "modules_to_save")
    modules = list(modules)
    return {
        end: {m for m in modules if any(p.endswith(end) for p in (m, *parents(m)))} for end in names
    }


def _excluded(source: str, config: Mapping[str, Any], modules: Collection[str]) -> set[str]:
    excluded = config.get("exclude_modules")
    if isinstance(excluded, str) and excluded:
        (found,) = matching(f"{source}: exclude_modules", [excluded], modules)
    else:
        ends = _names(source, config, "exclude_modules")
        found = {name for name in modules if _ends_in(name, ends)}
    if names := _names(source, config, "modules_to_save"):
        expressions = [rf"(?:.*\.)?(?:{name})(?:\..*)?" for name in names]
        found = found.union(*matching(f"{source}: modules_to_save", expressions, modules))
    return found


def _in_layers(source: str, config: Mapping[str, Any], modules: Collection[str]) -> set[str]:
    layers, before = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or layers == []:
        return set(modules)
    indices = layers if isinstance(layers, list) else [layers]
    if not all(type(layer) is int for layer in indices):
        raise ValueError(f"{source}: layers_to_transform is {layers!r:.200}, expected integers.")
    before = [before] if isinstance(before, str) else before or []
    if not isinstance(before, list) or not all(
        isinstance(name, str) and re.fullmatch(r"\w+", name) for name in before
    ):
        raise ValueError(f"{source}: layers_pattern is {before!r:.200}, expected names of modules.")
    chosen = set(indices)
    return {name for name in modules if _layer(name, before) in chosen}


def _layer(name: str, before: list[str]) -> int | None:
    """The first number in a name, or the first after a component of one of these names."""
    parts = name.split(".")
    if not before:
        return next((int(part) for part in parts[2:-1] if part.isdecimal()), None)
    for first in before:
        for part, behind in itertools.pairwise(parts[:-1]):
            if part == first and behind.isdecimal():
                return int(behind)
    return None


def _names(source: str, config: Mapping[str, Any], field: str) -> list[str]:
    found = config.get(field) or []
    if not isinstance(found, list) or not all(isinstance(name, str) and name for name in found):
        raise ValueError(f"{source}: {field} is {found!r:.200}, expected a list of names.")
    return found


def _ends_in(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _suffix(name: str) -> str:
    return name.rpartition(".")[2]
