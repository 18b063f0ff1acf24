"""The table of virtual tokens, PEFT's format of both a prompt and a prefix."""

import numpy as np

from lora_jax.interop.peft.codec import Contents
from lora_jax.interop.peft.model import Model

TABLE = "prompt_embeddings"


def table_of(contents: Contents, model: Model) -> np.ndarray:
    """The table that an adapter's file holds.

    Raises:
      ValueError: where it is missing, or has another number of tokens than its config states.
    """
    if TABLE not in contents.own:
        raise ValueError(f"{model.source} is incomplete: it lacks the tensor {TABLE!r}.")
    table, config = contents.own[TABLE], contents.config
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
    return table
