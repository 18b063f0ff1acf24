"""From a delta to an adapter's config and tensors."""

from collections.abc import Mapping
from typing import Any

from lora_jax.interop.peft import full
from lora_jax.interop.peft.codec import Contents, Nodes
from lora_jax.interop.peft.codecs import codec_for, served_by_vllm
from lora_jax.interop.peft.config import target_modules
from lora_jax.interop.peft.model import Model, Tensors
from lora_jax.methods import FullNode


def encoded(
    nodes: Nodes, model: Model, profile: str
) -> tuple[dict[str, Any], Tensors, Mapping[str, str]]:
    """The config, the tensors and their metadata of `{path: node}`.

    Args:
      profile: "peft" or "vllm".

    Raises:
      ValueError: for another profile; for what its format lacks.
    """
    whole = {path: node for path, node in nodes.items() if isinstance(node, FullNode)}
    others = {path: node for path, node in nodes.items() if path not in whole}
    codec = codec_for(others)
    if profile not in ("peft", "vllm"):
        raise ValueError(f"profile={profile!r}: expected 'peft' or 'vllm'.")
    encode = codec.encode_vllm if profile == "vllm" else codec.encode
    if encode is None or (whole and profile == "vllm"):
        odd = next(iter(whole), codec.types[0])
        raise ValueError(
            f"vLLM serves {' and '.join(served_by_vllm())} alone, and not {odd}. Merge the adapter "
            "and serve the merged model."
        )
    contents = encode(others, model)
    adapted = contents.modules.keys() & model.slots.keys()
    if codec.in_layers and not adapted:
        raise ValueError("the delta adapts nothing: every layer's scale is zero.")
    stated, values = full.to_peft(whole, model, adapted, codec)
    if codec.in_layers:
        stated["target_modules"] = target_modules(sorted(adapted), list(model.slots))
    config = {"peft_type": codec.types[0], **contents.config, **stated}
    named = {codec.prefix + name: value for name, value in (_flat(contents) | values).items()}
    return config, contents.own | named, contents.metadata


def _flat(contents: Contents) -> Tensors:
    return {
        f"{module}.{name}": value
        for module, tensors in contents.modules.items()
        for name, value in tensors.items()
    }
