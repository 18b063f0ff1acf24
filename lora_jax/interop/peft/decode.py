"""From an adapter's config and tensors to a delta."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.interop.peft import full, tokens
from lora_jax.interop.peft.codec import Codec, Contents
from lora_jax.interop.peft.codecs import CODECS
from lora_jax.interop.peft.complete import check_saved, check_targets, without_base
from lora_jax.interop.peft.model import Model, Tensors
from lora_jax.interop.peft.names import HEAD, TABLE, parents
from lora_jax.interop.peft.targeted import saved
from lora_jax.interop.peft.tied import without_head
from lora_jax.methods import FullNode
from lora_jax.paths import nearest


def decoded(
    codec: Codec,
    config: Mapping[str, Any],
    tensors: Tensors,
    metadata: Mapping[str, str],
    model: Model,
) -> dict[str, Any]:
    """`{path: node}` of an adapter's file.

    Raises:
      ValueError: for what the config states and the file lacks, or the other way round; for what
        has no equivalent here.
    """
    if not tensors:
        raise ValueError(f"{model.source} is incomplete: its file holds no tensor.")
    own = {name: value for name, value in tensors.items() if name in codec.own}
    tensors = {
        _inner_name(model.source, codec, name): value
        for name, value in tensors.items()
        if name not in own
    }
    if codec.in_layers:
        check_targets(config, tensors, model)
    check_saved(config, tensors, model)
    tensors = without_base(tensors, model)
    tensors = without_head(config, tensors, model)
    rows = tokens.from_peft(config, tensors, model)
    whole = _without_unchanged(config, full.from_peft(tensors, model), model)
    modules = _by_module(tensors, model)
    if modules and not codec.in_layers:
        raise ValueError(
            f"{model.source}: {', '.join(modules)} are adapted, which {codec.types[0]} does to no "
            "layer."
        )
    nodes = codec.decode(Contents(config, modules, own, metadata), model)
    if codec.check_whole:
        codec.check_whole(whole, model)
    return _together(model, nodes, whole, rows)


def _without_unchanged(
    config: Mapping[str, Any], whole: dict[str, FullNode], model: Model
) -> dict[str, FullNode]:
    """Without the base's own table and head, which PEFT saves in case that they were resized."""
    tables = {name: path for path in whole if (name := model.names[path]).endswith((TABLE, HEAD))}
    named = set().union(*saved(model.source, config, tables).values())
    same = {
        path
        for name, path in tables.items()
        if name not in named and not np.any(np.asarray(whole[path].delta))
    }
    return {path: node for path, node in whole.items() if path not in same}


def _together(model: Model, *parts: Mapping[str, Any]) -> dict[str, Any]:
    """One delta of several. A bias that is trained and shifted too gets the sum of both."""
    nodes: dict[str, Any] = {}
    for path, node in (item for part in parts for item in part.items()):
        before = nodes.get(path)
        if isinstance(node, FullNode) and isinstance(before, FullNode):
            node = FullNode(delta=node.delta + before.delta)
        elif before is not None:
            raise ValueError(
                f"{model.source} adapts {model.names[path]} and replaces it as well: there is no "
                "form for both."
            )
        nodes[path] = node
    return nodes


def _inner_name(folder: str, codec: Codec, name: str) -> str:
    if name.startswith(codec.prefix):
        return name.removeprefix(codec.prefix)
    if other := next((other for other in CODECS if name in other.own), None):
        raise ValueError(f"{folder}: {name} belongs to {other.types[0]}, not to {codec.types[0]}.")
    raise ValueError(f"{folder}: the tensor {name!r} does not begin with {codec.prefix!r}.")


def _by_module(tensors: Tensors, model: Model) -> dict[str, Tensors]:
    grouped: dict[str, Tensors] = {}
    for name, value in tensors.items():
        module = next((m for m in parents(name) if m in model.slots), None)
        if module is None:
            raise ValueError(
                f"{model.source}: the tensor {name!r} belongs to no module of this model; the "
                f"nearest are: {', '.join(nearest(name, model.slots))}."
            )
        rest = name.removeprefix(f"{module}.")
        if rest in ("weight", "bias"):
            raise ValueError(f"{model.source} has {name}, for which this base has no place.")
        grouped.setdefault(module, {})[rest] = value
    return grouped
