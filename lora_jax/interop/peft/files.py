"""Reading and writing the folder of an adapter."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from lora_jax.interop.digest import KEY, Digest, can_run, digest_of, name_of
from lora_jax.interop.forward import AnyForward, ModelForward
from lora_jax.interop.peft import folder as folders
from lora_jax.interop.peft import own_base as own_bases
from lora_jax.interop.peft import stated_base
from lora_jax.interop.peft.codecs import codec_of
from lora_jax.interop.peft.config import check_values
from lora_jax.interop.peft.decode import decoded
from lora_jax.interop.peft.encode import encoded
from lora_jax.interop.peft.model import model_of
from lora_jax.interop.peft.names import ModelNames, Names
from lora_jax.layouts import Layout
from lora_jax.paths import nest
from lora_jax.transform import Delta, delta_nodes
from lora_jax.weights import PyTree


def load_adapter(
    folder: str | Path,
    params: PyTree,
    names: Names,
    *,
    layouts: Mapping[str, Layout | None] | None = None,
    check_base: bool = True,
) -> Delta:
    """Loads an adapter of PEFT as a delta for `params`.

    Args:
      folder: written by `save_pretrained`: adapter_config.json and adapter_model.safetensors.
      params: the base, or its shapes; DoRA and modules_to_save need the weights themselves.
      names: `{path: module}`, `{}` for the index of a stacked layer; `model_names(config)`. Where
        embed_tokens is named and no lm_head, the head is taken to be the table: tied.
      layouts: of leaves that are more than stacked matrices.
      check_base: whether to check the fingerprint of the base, where the adapter states it.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: a method or an option that we do not have, a tensor that is missing, unexpected or
        of another shape than this base needs; a file that lacks what its config states; an
        adapter of a table or a head alone over a tied base (see `models.untie`); one that was
        saved here for a base of the same shapes with other weights.
    """
    folder = Path(folder)
    config = folders.read_config(folder)
    source = str(folder / folders.CONFIG)
    codec = codec_of(source, config)
    check_values(source, config, codec.values)
    tensors, metadata = folders.read_tensors(folder)
    if check_base:
        stated_base.check(folder, params, metadata)
    model = model_of(str(folder), params, names, layouts)
    try:
        nodes = decoded(codec, config, tensors, metadata, model)
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

    A delta that was initialised by PiSSA or OLoRA is written as the equivalent plain LoRA of the
    original base, of twice the rank. The metadata have a digest, the adapter's logits on a fixed
    probe, against which `verify` checks a loaded adapter. Other programs ignore it.

    Args:
      folder: must not hold an adapter yet.
      delta: of one of PEFT's methods, with `Full` for its modules_to_save; IA3 over layers with
        biases with the entries of `scale_biases`.
      params: the base, or its shapes; `Full` needs the weights themselves.
      names: `{path: module}`, `{}` for the index of a stacked layer; `model_names(config)`.
      base_name: the base's folder or hub name, for base_model_name_or_path.
      layouts: of leaves that are more than stacked matrices.
      num_kv_heads: of the model; PEFT's format of a prefix states it.
      profile: "peft", or "vllm" for vLLM's format: LoRA alone, its scales folded into B and its
        ranks padded to one that vLLM accepts.
      card: the text of README.md, such as `model_card` makes.
      base_fingerprint: `fingerprint(params)` where it is known; else it is computed.
      forward: the model, to make the digest with; that of our Llama is known by its names.
      digest: `digest_of(forward, params, delta)` where it is known, as it must be where params are
        sharded over several processes. There, for shapes alone, and for a model without a
        `forward`, none is made, and `verify` reports that.
      own_base: states that `params`, the base that `loftq_start` returned, is exported with the
        adapter, and that `base_name` names that export. The adapter is wrong over any other base.

    Raises:
      FileExistsError: the folder holds an adapter.
      ValueError: what the format of PEFT, or of vLLM, lacks; a path without a name; a delta that
        belongs to a base of its own, without `own_base`.
    """
    folder = Path(folder)
    owned = own_bases.metadata_of(delta_nodes(delta), own_base)
    folders.refuse_adapter(folder)
    model = model_of(str(folder), params, names, layouts, num_kv_heads)
    config, tensors, metadata = encoded(delta_nodes(delta), model, profile)
    config |= {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
    }
    metadata = {**metadata, **stated_base.metadata_of(params, base_fingerprint), **owned}
    if forward is None and isinstance(names, ModelNames):
        forward = ModelForward(names.config)
    if digest is None and forward is not None and can_run(params):
        digest = digest_of(forward, params, delta)
    if digest is not None:
        metadata[KEY] = dataclasses.replace(digest, adapter=name_of(tensors)).to_json()
    folders.write(folder, config, tensors, metadata, card)
