"""Checks that the model reads every prompt and prefix that a delta puts into its weights."""

from typing import Any

from lora_jax import paths
from lora_jax.methods import Extra
from lora_jax.models.config import DecoderConfig
from lora_jax.weights import is_weight

READ = ("prompt", "layers/attn/prefix")


def require_read(params: Any, config: DecoderConfig) -> None:
    """Raises ValueError for a prompt or a prefix at a path that the model does not read, and
    for a prefix of another width than the keys."""
    leaves = paths.flatten(params, is_leaf=lambda leaf: isinstance(leaf, Extra) or is_weight(leaf))
    found = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Extra)}
    for path, leaf in found.items():
        if path not in READ:
            raise ValueError(
                f"{path}: a {type(leaf).__name__} stands where this model reads none. Target "
                'the key projections with a Prefix, targets="k_proj", and the embedding with a '
                'Prompt, targets="embed".'
            )
    prefix: Any = found.get("layers/attn/prefix")
    width = config.num_kv_heads * config.head_dim
    if prefix is not None and prefix.k.shape[-1] != width:
        raise ValueError(
            f"layers/attn/prefix is {prefix.k.shape[-1]} wide, the keys of this model are {width}, "
            f"{config.num_kv_heads} heads of {config.head_dim}. Make it for the key projections: "
            'targets="k_proj".'
        )
