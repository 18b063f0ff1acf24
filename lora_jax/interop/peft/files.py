"""Reading and writing the folder of an adapter."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lora_jax.fingerprint import fingerprint, form
from lora_jax.interop.peft import adalora, full, lora, prompts, vectors
from lora_jax.interop.peft import own_base as own_bases
from lora_jax.interop.peft.config import check_values
from lora_jax.interop.peft.model import Model, Tensors, model_of
from lora_jax.interop.peft.names import Names
from lora_jax.interop.read_json import read_json
from lora_jax.layouts import Layout
from lora_jax.methods import (
    DecomposedLowRank,
    DenseDelta,
    EncodedKeyValues,
    KeyValues,
    LowRank,
    Projection,
    Rescaled,
    SharedLowRank,
    SoftPrompt,
    Triplets,
)
from lora_jax.paths import nearest, nest
from lora_jax.transform import Delta, delta_nodes
from lora_jax.weights import PyTree

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FLOATS = ("F64", "F32", "F16", "BF16")
_FORM, _FINGERPRINT = "lora_jax.base_form", "lora_jax.base_fingerprint"
_GROUPS: dict[str, tuple[type, ...]] = {
    "LORA": (LowRank, DecomposedLowRank),
    "IA3": (Rescaled,),
    "VERA": (SharedLowRank, Projection),
    "ADALORA": (Triplets,),
    "PROMPT_TUNING": (SoftPrompt,),
    "PREFIX_TUNING": (KeyValues, EncodedKeyValues),
}


def load_adapter(
    folder: str | Path,
    params: PyTree,
    names: Names,
    *,
    layouts: Mapping[str, Layout | None] | None = None,
    check_base: bool = True,
) -> Delta:
    """The delta that an adapter of PEFT is, for `params`.

    Args:
      folder: what `save_pretrained` wrote: adapter_config.json and adapter_model.safetensors.
      params: the base, or its shapes; DoRA and modules_to_save need the weights themselves.
      names: `{path: module}`, `{}` for the index of a stacked layer; `llama_names(config)`.
      layouts: of leaves that are more than stacked matrices.
      check_base: whether an adapter that states its base's fingerprint is held to it.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: a method or an option that we do not have, a tensor that is missing, unexpected or
        of another shape than this base asks for; an adapter that was saved here for a base of the
        same form with other weights.
    """
    folder = Path(folder)
    config = _read_config(folder)
    check_values(str(folder / _CONFIG), config)
    tensors, metadata = _read_tensors(folder)
    if check_base:
        _check_base(folder, params, metadata)
    model = model_of(str(folder), params, names, layouts)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in _GROUPS:
        raise ValueError(
            f"{folder / _CONFIG}: peft_type {kind!r} is not supported; supported: "
            f"{', '.join(_GROUPS)}."
        )
    try:
        return nest(own_bases.marked(_decoded(kind, config, tensors, model), metadata))
    except ValueError as error:
        if str(folder) in str(error):
            raise
        raise ValueError(f"{folder}: {error}") from error


def save_adapter(
    folder: str | Path,
    delta: Delta,
    params: PyTree,
    names: Names,
    *,
    base_name: str | None = None,
    layouts: Mapping[str, Layout | None] | None = None,
    num_kv_heads: int | None = None,
    profile: str = "peft",
    card: str | None = None,
    base_fingerprint: str | None = None,
    own_base: bool = False,
) -> None:
    """Writes a delta as an adapter that PEFT loads.

    What began as PiSSA or OLoRA is written as the plain LoRA of the original base that it is, of
    twice the rank.

    Args:
      folder: must not hold an adapter yet.
      delta: of one of PEFT's methods, with `Full` for its modules_to_save.
      params: the base, or its shapes; `Full` needs the weights themselves.
      names: `{path: module}`, `{}` for the index of a stacked layer; `llama_names(config)`.
      base_name: the base's folder or hub name, for base_model_name_or_path.
      layouts: of leaves that are more than stacked matrices.
      num_kv_heads: of the model; PEFT's form of a prefix states it.
      profile: "peft", or "vllm" for what vLLM serves: LoRA alone, its scales folded into B and its
        ranks padded to one that vLLM accepts.
      card: the text of README.md, such as `model_card` makes.
      base_fingerprint: `fingerprint(params)` where it is known; else it is computed.
      own_base: says that `params`, the base that `loftq_start` made, is exported with the adapter,
        and that `base_name` names that export. The adapter shifts every other base.

    Raises:
      FileExistsError: the folder holds an adapter.
      ValueError: what PEFT, or vLLM, has no form for; a path without a name; a delta that belongs
        to a base of its own, unless `own_base` says so.
    """
    folder = Path(folder)
    owned = own_bases.metadata_of(delta_nodes(delta), own_base)
    if (folder / _CONFIG).exists() or (folder / _TENSORS).exists():
        raise FileExistsError(f"{folder} holds an adapter already: choose another folder.")
    model = model_of(str(folder), params, names, layouts)
    config, tensors = _encoded(delta_nodes(delta), model, profile, num_kv_heads)
    config |= {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
    }
    metadata = _base_metadata(params, base_fingerprint) | owned
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(tensors, folder / _TENSORS, metadata={"format": "pt"} | metadata)
    if card is not None:
        (folder / "README.md").write_text(card)
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _decoded(
    kind: str, config: Mapping[str, Any], tensors: Tensors, model: Model
) -> dict[str, Any]:
    if kind in ("PROMPT_TUNING", "PREFIX_TUNING"):
        return _prompts(kind, tensors, model)
    pair = {name: tensors.pop(name) for name in list(tensors) if name in vectors.PAIR}
    inner = {_inner_name(model.source, name): value for name, value in tensors.items()}
    whole = full.from_peft(inner, model)
    grouped = _by_module(inner, model)
    if kind == "LORA":
        nodes = lora.from_peft(config, grouped, model)
    elif kind == "IA3":
        nodes = vectors.ia3_from_peft(config, grouped, model)
    elif kind == "VERA":
        nodes = vectors.vera_from_peft(config, grouped, pair, model)
    else:
        nodes = adalora.from_peft(config, grouped, model)
    return {**nodes, **whole}


def _encoded(
    nodes: Mapping[str, Any], model: Model, profile: str, num_kv_heads: int | None
) -> tuple[dict, Tensors]:
    whole = {path: node for path, node in nodes.items() if isinstance(node, DenseDelta)}
    others = {path: node for path, node in nodes.items() if path not in whole}
    kind = _kind(others)
    if profile not in ("peft", "vllm"):
        raise ValueError(f"profile={profile!r}: expected 'peft' or 'vllm'.")
    if profile == "vllm" and (kind != "LORA" or whole):
        odd = next(iter(whole), kind)
        raise ValueError(
            f"vLLM serves LoRA alone, and not {odd}. Merge the adapter and serve the merged model."
        )
    if kind == "PROMPT_TUNING":
        config, tensors = prompts.prompt_to_peft(others)
    elif kind == "PREFIX_TUNING":
        config, tensors = prompts.prefix_to_peft(others, num_kv_heads)
    else:
        encode = {
            "LORA": lora.to_vllm if profile == "vllm" else lora.to_peft,
            "IA3": vectors.ia3_to_peft,
            "VERA": _vera,
            "ADALORA": adalora.to_peft,
        }[kind]
        config, tensors = encode(others, model)
    own = [path for path in others if path in model.names]
    adapted = {slot.module for slot in model.slots_at(own)}
    stated, values = full.to_peft(whole, model, adapted)
    tensors = {
        name if name.startswith("base_model.") or name == prompts.TABLE else _PREFIX + name: value
        for name, value in (tensors | values).items()
    }
    return config | stated, tensors


def _vera(nodes: Mapping[str, Any], model: Model) -> tuple[dict[str, Any], Tensors]:
    pairs = {path: node for path, node in nodes.items() if isinstance(node, Projection)}
    own = {path: node for path, node in nodes.items() if path not in pairs}
    return vectors.vera_to_peft(own, pairs, model)


def _kind(nodes: Mapping[str, Any]) -> str:
    found: dict[str, str] = {}
    for path, node in nodes.items():
        kinds = [kind for kind, types in _GROUPS.items() if isinstance(node, types)]
        if not kinds:
            raise ValueError(
                f"{path}: PEFT has no form for {type(node).__name__}. Merge it, and export the "
                "merged model."
            )
        found.setdefault(kinds[0], path)
    if len(found) != 1:
        listed = ", ".join(f"{kind} ({path})" for kind, path in found.items()) or "none"
        raise ValueError(f"an adapter of PEFT has one method, this delta has {listed}.")
    return next(iter(found))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {_CONFIG}; expected a folder that PEFT's save_pretrained wrote."
        )
    return dict(read_json(path))


def _base_metadata(params: PyTree, known: str | None = None) -> dict[str, str]:
    """What tells the base again, if its weights are at hand or their fingerprint is known."""
    shapes_alone = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    if shapes_alone and known is None:
        return {}
    return {_FORM: form(params), _FINGERPRINT: known or fingerprint(params)}


def _check_base(folder: Path, params: PyTree, metadata: Mapping[str, str]) -> None:
    """A base in other dtypes, or quantised, cannot be compared; one of the same form can."""
    ours = _base_metadata(params)
    comparable = ours and metadata.get(_FORM) == ours[_FORM]
    if comparable and metadata.get(_FINGERPRINT) != ours[_FINGERPRINT]:
        raise ValueError(
            f"{folder} was made for another base: its fingerprint is "
            f"{metadata.get(_FINGERPRINT)}, this one's {ours[_FINGERPRINT]}. Load the base that "
            "the adapter names; check_base=False takes this one, a rounding of it for example."
        )


def _read_tensors(folder: Path) -> tuple[Tensors, dict[str, str]]:
    path = folder / _TENSORS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {_TENSORS}. Pickles (.bin) are not read: load the adapter in PEFT "
            "and save it again, save_pretrained(..., safe_serialization=True)."
        )
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            for name in names:
                if (kind := file.get_slice(name).get_dtype()) not in _FLOATS:
                    raise ValueError(
                        f"{path}: the tensor {name!r} is {kind}, expected one of "
                        f"{', '.join(_FLOATS)}."
                    )
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}); fetch it again.") from None


def _inner_name(folder: str, name: str) -> str:
    if not name.startswith(_PREFIX):
        raise ValueError(f"{folder}: the tensor {name!r} does not begin with {_PREFIX!r}.")
    return name.removeprefix(_PREFIX)


def _by_module(tensors: Tensors, model: Model) -> dict[str, Tensors]:
    grouped: dict[str, Tensors] = {}
    for name, value in tensors.items():
        module = next((m for m in _ends(name) if m in model.slots), None)
        if module is None:
            raise ValueError(
                f"{model.source}: the tensor {name!r} belongs to no module of this model; the "
                f"nearest are: {', '.join(nearest(name, model.slots))}."
            )
        grouped.setdefault(module, {})[name.removeprefix(module + ".")] = value
    return grouped


def _ends(name: str):
    """`a.b.c` as `a.b` and `a`: the modules that a tensor may belong to."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _prompts(kind: str, tensors: Tensors, model: Model) -> dict[str, Any]:
    if set(tensors) != {prompts.TABLE}:
        raise ValueError(f"{model.source}: expected the tensor {prompts.TABLE!r} alone.")
    table = tensors[prompts.TABLE]
    if kind == "PROMPT_TUNING":
        return prompts.prompt_from_peft(table)
    keys = [slot for slot in model.slots.values() if slot.suffix == "k_proj"]
    if not keys:
        raise ValueError("a prefix takes its width from a leaf named k_proj; names has none.")
    place = "/".join([*keys[0].path.split("/")[:-1], "prefix"])
    return prompts.prefix_from_peft(table, place, len(keys), keys[0].d_out)
