"""The delta that the tensors of an adapter are."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lora_jax.interop.peft import adalora, full, ia3, lora, prompts, tokens, vera
from lora_jax.interop.peft.complete import check_saved, check_targets, without_base
from lora_jax.interop.peft.config import check_supported
from lora_jax.interop.peft.model import Model, Tensors
from lora_jax.interop.peft.names import HEAD, TABLE, parents
from lora_jax.interop.peft.targeted import saved
from lora_jax.interop.peft.tied import without_head
from lora_jax.methods import FullNode
from lora_jax.paths import nearest, nest
from lora_jax.transform import delta_nodes

_PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
_DECODERS: dict[str, Callable[..., dict[str, Any]]] = {
    "LORA": lora.from_peft,
    "ADALORA": adalora.from_peft,
    "IA3": ia3.from_peft,
}
TYPES = ("LORA", "IA3", "VERA", "ADALORA", *_PROMPTS)


def decoded(
    kind: str,
    config: Mapping[str, Any],
    tensors: Tensors,
    model: Model,
    *,
    scales_biases: bool = True,
) -> dict[str, Any]:
    """`{path: node}` of an adapter's file.

    Args:
      kind: one of `TYPES`.
      scales_biases: whether IA3 is PEFT's, which scales a layer's bias with its output.

    Raises:
      ValueError: for what the config states and the file lacks, or the other way round; for what
        has no form here.
    """
    check_supported(model.source, config)
    if not tensors:
        raise ValueError(f"{model.source} is not whole: its file holds no tensor.")
    own: dict[str, Any] = {}
    if kind in _PROMPTS:
        own, tensors = _prompts(kind, config, tensors, model)
    pair = {name: tensors.pop(name) for name in list(tensors) if name in vera.PAIR}
    if kind not in _PROMPTS:
        tensors = {_inner_name(model.source, name): value for name, value in tensors.items()}
        check_targets(config, tensors, model)
    check_saved(config, tensors, model)
    tensors = without_base(tensors, model)
    tensors = without_head(config, tensors, model)
    rows = tokens.from_peft(config, tensors, model)
    whole = _without_unchanged(config, full.from_peft(tensors, model), model)
    grouped = _by_module(tensors, model)
    if kind == "VERA":
        own = vera.from_peft(config, grouped, pair, model)
    elif pair:
        raise ValueError(f"{model.source}: {', '.join(pair)} belong to VeRA, not to {kind}.")
    elif kind in _DECODERS:
        own = _DECODERS[kind](config, grouped, model)
        if kind == "IA3" and scales_biases:
            own = delta_nodes(ia3.scale_biases(nest(own), model.names))
    elif grouped:
        raise ValueError(f"{model.source}: {', '.join(grouped)} are adapted beside a prompt.")
    if kind in ("PROMPT_TUNING", "P_TUNING"):
        full.refuse_table_of_prompt(whole, model)
    return _together(model, own, whole, rows)


def _prompts(
    kind: str, config: Mapping[str, Any], tensors: Tensors, model: Model
) -> tuple[dict[str, Any], Tensors]:
    """The prompt, and the other tensors under the names of the model."""
    rest = {
        name.removeprefix("base_model."): value
        for name, value in tensors.items()
        if name != prompts.TABLE
    }
    if prompts.TABLE not in tensors:
        raise ValueError(f"{model.source} is not whole: it lacks the tensor {prompts.TABLE!r}.")
    table = tensors[prompts.TABLE]
    prompts.check_count(config, table)
    if kind != "PREFIX_TUNING":
        tables = [slot.d_out for slot in model.slots.values() if slot.suffix == TABLE]
        return prompts.prompt_from_peft(table, tables[0] if tables else None), rest
    keys = [slot for slot in model.slots.values() if slot.suffix == "k_proj"]
    if not keys:
        raise ValueError("a prefix takes its width from a leaf named k_proj; names has none.")
    place = "/".join([*keys[0].path.split("/")[:-1], "prefix"])
    return prompts.prefix_from_peft(table, place, len(keys), keys[0].d_out), rest


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


def _inner_name(folder: str, name: str) -> str:
    prefix = "base_model.model."
    if not name.startswith(prefix):
        raise ValueError(f"{folder}: the tensor {name!r} does not begin with {prefix!r}.")
    return name.removeprefix(prefix)


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
