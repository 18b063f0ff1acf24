"""Reading and writing the folder of an adapter."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lora_jax.fingerprint import fingerprint, form
from lora_jax.interop.digest import KEY, Digest, can_run, digest_of, name_of
from lora_jax.interop.forward import AnyForward, ModelForward
from lora_jax.interop.peft import adalora, full, ia3, lora, prompts, vera
from lora_jax.interop.peft import own_base as own_bases
from lora_jax.interop.peft.config import check_values
from lora_jax.interop.peft.decode import TYPES, decoded
from lora_jax.interop.peft.model import Model, Tensors, model_of
from lora_jax.interop.peft.names import ModelNames, Names, parents
from lora_jax.interop.read_json import read_json
from lora_jax.layouts import Layout
from lora_jax.methods import (
    AdaLoRANode,
    DoRANode,
    EncodedPrefixNode,
    FullNode,
    IA3BiasNode,
    IA3Node,
    LoRANode,
    PrefixNode,
    PromptNode,
    VeRANode,
    VeRAProjection,
)
from lora_jax.paths import nest
from lora_jax.transform import Delta, delta_nodes
from lora_jax.weights import PyTree

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")
_FORM, _FINGERPRINT = "lora_jax.base_form", "lora_jax.base_fingerprint"
_SCALES_BIASES = "lora_jax.ia3_scales_biases"
_GROUPS: dict[str, tuple[type, ...]] = {
    "LORA": (LoRANode, DoRANode),
    "IA3": (IA3Node, IA3BiasNode),
    "VERA": (VeRANode, VeRAProjection),
    "ADALORA": (AdaLoRANode,),
    "PROMPT_TUNING": (PromptNode,),
    "PREFIX_TUNING": (PrefixNode, EncodedPrefixNode),
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
      names: `{path: module}`, `{}` for the index of a stacked layer; `model_names(config)`. Where
        embed_tokens is named and no lm_head, the head is taken to be the table: tied.
      layouts: of leaves that are more than stacked matrices.
      check_base: whether an adapter that states its base's fingerprint is held to it.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: a method or an option that we do not have, a tensor that is missing, unexpected or
        of another shape than this base asks for; a file that lacks what its config states; an
        adapter of a table or a head alone over a tied base, which `models.untie` makes ready;
        one that was saved here for a base of the same form with other weights.
    """
    folder = Path(folder)
    config = _read_config(folder)
    check_values(str(folder / _CONFIG), config)
    tensors, metadata = _read_tensors(folder)
    if check_base:
        _check_base(folder, params, metadata)
    model = model_of(str(folder), params, names, layouts)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in TYPES:
        raise ValueError(
            f"{folder / _CONFIG}: peft_type {kind!r} is not supported; supported: "
            f"{', '.join(TYPES)}."
        )
    try:
        # Version 0.1.0 wrote IA3 that had left the biases alone.
        scales = _FORM not in metadata or _SCALES_BIASES in metadata
        nodes = decoded(kind, config, tensors, model, scales_biases=scales)
        return nest(own_bases.marked(nodes, metadata))
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
    forward: AnyForward | None = None,
    digest: Digest | None = None,
    own_base: bool = False,
) -> None:
    """Writes a delta as an adapter that PEFT loads.

    What began as PiSSA or OLoRA is written as the plain LoRA of the original base that it is, of
    twice the rank. Its metadata carry a digest, the logits that the adapter gives on a fixed probe,
    which `verify` holds a loaded adapter to. Other programs ignore it.

    Args:
      folder: must not hold an adapter yet.
      delta: of one of PEFT's methods, with `Full` for its modules_to_save; IA3 over layers with
        biases with the entries of `scale_biases`.
      params: the base, or its shapes; `Full` needs the weights themselves.
      names: `{path: module}`, `{}` for the index of a stacked layer; `model_names(config)`.
      base_name: the base's folder or hub name, for base_model_name_or_path.
      layouts: of leaves that are more than stacked matrices.
      num_kv_heads: of the model; PEFT's form of a prefix states it.
      profile: "peft", or "vllm" for what vLLM serves: LoRA alone, its scales folded into B and its
        ranks padded to one that vLLM accepts.
      card: the text of README.md, such as `model_card` makes.
      base_fingerprint: `fingerprint(params)` where it is known; else it is computed.
      forward: the model, to make the digest with; that of our Llama is known by its names.
      digest: `digest_of(forward, params, delta)` where it is known, as it must be where params lie
        over several processes. There, for shapes alone, and for a model without a `forward`, none
        is made, and `verify` will say so.
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
    if config["peft_type"] == "IA3":
        metadata[_SCALES_BIASES] = "true"
    if forward is None and isinstance(names, ModelNames):
        forward = ModelForward(names.config)
    if digest is None and forward is not None and can_run(params):
        digest = digest_of(forward, params, delta)
    if digest is not None:
        metadata[KEY] = dataclasses.replace(digest, adapter=name_of(tensors)).to_json()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(tensors, folder / _TENSORS, metadata={"format": "pt"} | metadata)
    if card is not None:
        (folder / "README.md").write_text(card)
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _encoded(
    nodes: Mapping[str, Any], model: Model, profile: str, num_kv_heads: int | None
) -> tuple[dict, Tensors]:
    whole = {path: node for path, node in nodes.items() if isinstance(node, FullNode)}
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
            "IA3": ia3.to_peft,
            "VERA": _vera,
            "ADALORA": adalora.to_peft,
        }[kind]
        config, tensors = encode(others, model)
    adapted = {module for name in tensors for module in parents(name) if module in model.slots}
    stated, values = full.to_peft(whole, model, adapted, kind)
    # PEFT wraps a model once more for methods that change its layers.
    prefix = "base_model." if prompts.TABLE in tensors else "base_model.model."
    tensors = {
        name if name.startswith("base_model.") or name == prompts.TABLE else prefix + name: value
        for name, value in (tensors | values).items()
    }
    return config | stated, tensors


def _vera(nodes: Mapping[str, Any], model: Model) -> tuple[dict[str, Any], Tensors]:
    pairs = {path: node for path, node in nodes.items() if isinstance(node, VeRAProjection)}
    own = {path: node for path, node in nodes.items() if path not in pairs}
    return vera.to_peft(own, pairs, model)


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
