"""Prompt and prefix tuning: one table of virtual tokens for the whole model."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.interop.peft.model import Tensors
from lora_jax.methods import EncodedPrefixNode, PrefixNode, PromptNode

TABLE = "prompt_embeddings"


def prompt_to_peft(nodes: Mapping[str, PromptNode]) -> tuple[dict[str, Any], Tensors]:
    (node,) = nodes.values()
    rows = np.asarray(node.rows)
    config = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
    return config | {"num_virtual_tokens": len(rows), "token_dim": rows.shape[1]}, {TABLE: rows}


def prompt_from_peft(table: np.ndarray, width: int | None) -> dict[str, PromptNode]:
    """`width` is that of the embedding, where it is known."""
    if table.ndim != 2 or width not in (None, table.shape[1]):
        raise ValueError(
            f"{TABLE} has shape {table.shape}, expected (n, {width or 'd'}). Is it a prompt of "
            "this base?"
        )
    return {"prompt": PromptNode(rows=jnp.asarray(table, jnp.float32))}


def prefix_to_peft(
    nodes: Mapping[str, PrefixNode | EncodedPrefixNode], heads: int | None
) -> tuple[dict[str, Any], Tensors]:
    """Keys and values of layer l are at 2l and 2l + 1 of each row; an MLP is written out."""
    if heads is None:
        raise ValueError("PEFT's form of a prefix states the heads: give num_kv_heads.")
    if len(nodes) != 1:
        raise ValueError(f"expected one stacked prefix, found {', '.join(nodes)}.")
    (node,) = nodes.values()
    pair = node.bound() if isinstance(node, EncodedPrefixNode) else node
    layers, length, width = pair.k.shape
    table = jnp.stack([pair.k, pair.v], axis=1)  # [L, 2, P, width]
    rows = np.asarray(jnp.transpose(table, (2, 0, 1, 3)).reshape(length, -1))
    config = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": length,
        "num_layers": layers,
        "token_dim": width,
        "num_attention_heads": heads,
        "encoder_hidden_size": width,
        "prefix_projection": False,
    }
    return config, {TABLE: rows}


def prefix_from_peft(
    table: np.ndarray, path: str, layers: int, width: int
) -> dict[str, PrefixNode]:
    if table.ndim != 2 or table.shape[1] != 2 * layers * width:
        raise ValueError(
            f"{TABLE} has shape {table.shape}, expected (n, {2 * layers * width}): keys and values "
            f"of {width} entries for {layers} layers. Is it a prefix of this base?"
        )
    pair = jnp.asarray(table, jnp.float32).reshape(len(table), layers, 2, width)
    k, v = jnp.transpose(pair, (2, 1, 0, 3))
    return {path: PrefixNode(k=k, v=v)}


def check_count(config: Mapping[str, Any], table: np.ndarray) -> None:
    """Raises ValueError where the config and the table state different numbers of tokens."""
    stated, parts = config.get("num_virtual_tokens"), config.get("num_transformer_submodules")
    if parts not in (None, 1):
        raise ValueError(
            f"num_transformer_submodules is {parts!r:.200}: a prompt for more than a decoder is "
            "not supported."
        )
    if stated is not None and stated != len(table):
        raise ValueError(
            f"{TABLE} has {len(table)} tokens, the config's num_virtual_tokens is {stated!r:.200}."
        )
