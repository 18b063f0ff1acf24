"""Prefix tuning: keys and values of layer l are at 2l and 2l + 1 of each row of the table."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.interop.peft.codec import Codec, Contents
from lora_jax.interop.peft.model import Model
from lora_jax.interop.peft.virtual_tokens import TABLE, table_of
from lora_jax.methods import EncodedPrefixNode, PrefixNode


def _encode(nodes: Mapping[str, PrefixNode | EncodedPrefixNode], model: Model) -> Contents:
    """The keys and values of an MLP are written as they are computed."""
    if model.num_kv_heads is None:
        raise ValueError("PEFT's format of a prefix states the heads: give num_kv_heads.")
    if len(nodes) != 1:
        raise ValueError(f"expected one stacked prefix, found {', '.join(nodes)}.")
    (node,) = nodes.values()
    pair = node.bound() if isinstance(node, EncodedPrefixNode) else node
    layers, length, width = pair.k.shape
    table = jnp.stack([pair.k, pair.v], axis=1)  # [L, 2, P, width]
    rows = np.asarray(jnp.transpose(table, (2, 0, 1, 3)).reshape(length, -1))
    config = {
        "num_virtual_tokens": length,
        "num_layers": layers,
        "token_dim": width,
        "num_attention_heads": model.num_kv_heads,
        "encoder_hidden_size": width,
        "prefix_projection": False,
    }
    return Contents(config, own={TABLE: rows})


def _decode(contents: Contents, model: Model) -> dict[str, Any]:
    table = table_of(contents, model)
    keys = [slot for slot in model.slots.values() if slot.suffix == "k_proj"]
    if not keys:
        raise ValueError("a prefix takes its width from a leaf named k_proj; names has none.")
    layers, width = len(keys), keys[0].d_out
    if table.ndim != 2 or table.shape[1] != 2 * layers * width:
        raise ValueError(
            f"{TABLE} has shape {table.shape}, expected (n, {2 * layers * width}): keys and values "
            f"of {width} entries for {layers} layers. Is it a prefix of this base?"
        )
    pair = jnp.asarray(table, jnp.float32).reshape(len(table), layers, 2, width)
    k, v = jnp.transpose(pair, (2, 1, 0, 3))
    return {"/".join([*keys[0].path.split("/")[:-1], "prefix"]): PrefixNode(k=k, v=v)}


CODEC = Codec(
    types=("PREFIX_TUNING",),
    nodes=(PrefixNode, EncodedPrefixNode),
    decode=_decode,
    encode=_encode,
    own=(TABLE,),
    in_layers=False,
)
