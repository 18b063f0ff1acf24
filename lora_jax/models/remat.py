"""Rematerialisation policies: what is saved for the backward pass of a layer, or recomputed."""

from collections.abc import Callable
from typing import Literal

import jax

from lora_jax.kernels.attention import ATTENDED
from lora_jax.weights import NARROW, UNSCALED

Remat = Literal["none", "elementwise", "full", "offload"]
LAYER_INPUT = "layer_input"
SAVED = (
    "projected", "query", "key", "value", ATTENDED, "residual", "gate", "up", NARROW, UNSCALED
)  # fmt: skip


def checkpointed(layer: Callable, remat: Remat) -> Callable:
    """`layer` under the named rematerialisation policy."""
    policies = jax.checkpoint_policies
    named = {
        "elementwise": policies.save_only_these_names(*SAVED),
        "full": policies.nothing_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
    if remat == "none":
        return layer
    if remat not in named:
        raise ValueError(f"remat={remat!r}: expected one of none, {', '.join(named)}.")
    return jax.checkpoint(layer, policy=named[remat], prevent_cse=False)
