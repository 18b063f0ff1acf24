"""Adapters that belong to a base of their own, from `loftq_start`."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from lora_jax.methods import DeltaNode, LowRank

_OWN_BASE = "lora_jax.own_base"


def metadata_of(nodes: Mapping[str, DeltaNode], exported: bool) -> dict[str, str]:
    """The file's metadata of such nodes.

    Raises:
      ValueError: where there are such nodes without `exported`, which states that their base is
        exported with them, or `exported` without such nodes.
    """
    owned = {p: n.own_base for p, n in nodes.items() if isinstance(n, LowRank) and n.own_base}
    if owned and not exported:
        path, name = next(iter(owned.items()))
        raise ValueError(
            f"{path}: the delta belongs to the base that {name}_start made, and would shift the "
            "original one. Merge them and export the merged model; or export that base itself with "
            "save_huggingface, name it as base_name, and give own_base=True."
        )
    if exported and not owned:
        raise ValueError(
            "own_base=True, but the delta belongs to the original base. Leave own_base out."
        )
    return {_OWN_BASE: json.dumps(owned)} if owned else {}


def marked(nodes: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, Any]:
    """The nodes with the `own_base` that `metadata_of` wrote."""
    owned = json.loads(metadata.get(_OWN_BASE, "{}"))
    if not isinstance(owned, dict) or not all(isinstance(name, str) for name in owned.values()):
        raise ValueError(f"its metadata {_OWN_BASE} is {owned!r:.200}, expected names by path.")
    return {
        path: dataclasses.replace(node, own_base=owned.get(path, ""))
        if isinstance(node, LowRank)
        else node
        for path, node in nodes.items()
    }
