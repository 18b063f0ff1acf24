"""Prompt tuning and P-tuning: rows in front of the embedded tokens."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.interop.peft.codec import Codec, Contents
from lora_jax.interop.peft.model import Model
from lora_jax.interop.peft.names import TABLE as EMBEDDING
from lora_jax.interop.peft.virtual_tokens import TABLE, table_of
from lora_jax.methods import FullNode, PromptNode


def _encode(nodes: Mapping[str, PromptNode], model: Model) -> Contents:
    del model
    (node,) = nodes.values()
    rows = np.asarray(node.rows)
    config = {
        "prompt_tuning_init": "RANDOM",
        "num_virtual_tokens": len(rows),
        "token_dim": rows.shape[1],
    }
    return Contents(config, own={TABLE: rows})


def _decode(contents: Contents, model: Model) -> dict[str, Any]:
    table = table_of(contents, model)
    width = next((slot.d_out for slot in model.slots.values() if slot.is_embedding), None)
    if table.ndim != 2 or width not in (None, table.shape[1]):
        raise ValueError(
            f"{TABLE} has shape {table.shape}, expected (n, {width or 'd'}). Is it a prompt of "
            "this base?"
        )
    return {"prompt": PromptNode(rows=jnp.asarray(table, jnp.float32))}


def _refuse_embedding(whole: Mapping[str, FullNode], model: Model) -> None:
    """PEFT's prompts look tokens up in the base's table, whatever modules_to_save says of it."""
    for path, node in whole.items():
        if model.names[path].endswith(EMBEDDING) and np.any(np.asarray(node.delta)):
            raise ValueError(
                f"{path} is trained beside a prompt, and PEFT reads tokens from the base's own "
                "table then: it has no form for both. Leave one of them out."
            )


CODEC = Codec(
    types=("PROMPT_TUNING", "P_TUNING"),
    nodes=(PromptNode,),
    decode=_decode,
    encode=_encode,
    own=(TABLE,),
    in_layers=False,
    check_whole=_refuse_embedding,
)
