"""What full fine-tuning changed, as a file of safetensors: PEFT has no format for it."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from experiments.harness.outcome import Outcome
from lora_jax import paths
from lora_jax.fingerprint import fingerprint
from lora_jax.interop.writing import appearing
from lora_jax.methods import FullNode
from lora_jax.parallel import hosts
from lora_jax.transform import Delta, delta_nodes
from lora_jax.weights import PyTree, is_weight

FOLDER, SUFFIX = "full_updates", ".safetensors"  # in a run's folder, a file for each arm
_BASE = "lora_jax.base_fingerprint"


def save_all(folder: Path, outcomes: Sequence[Outcome], base_fingerprint: str) -> None:
    """Writes what is not there yet: every arm that only tuned in full, and did not diverge.

    A file is as large as the model in float32.
    """
    for outcome in outcomes:
        nodes = delta_nodes(outcome.delta).values()
        if outcome.diverged or not all(isinstance(node, FullNode) for node in nodes):
            continue
        target = folder / f"{outcome.arm.folder}{SUFFIX}"
        if not hosts.exchange([target.exists()])[0][0]:
            delta = hosts.gathered(outcome.delta)
            hosts.on_first(lambda: save(target, delta, base_fingerprint))  # noqa: B023


def save(path: Path, delta: Delta, base_fingerprint: str) -> None:
    """Writes a delta of `Full` nodes alone, by path.

    Raises:
      ValueError: for a node of another method, or a file that is there.
    """
    tensors = {}
    for name, node in delta_nodes(delta).items():
        if not isinstance(node, FullNode):
            raise ValueError(
                f"{name}: a {type(node).__name__}, and this file holds Full alone. Save it as an "
                "adapter."
            )
        tensors[name] = np.ascontiguousarray(jax.device_get(node.delta))
    with appearing(path) as partial:
        save_file(tensors, partial, metadata={_BASE: base_fingerprint})


def load(path: Path, params: PyTree) -> Delta:
    """The delta that `save` wrote, for `params`.

    Raises:
      ValueError: for another base, or a tensor that it has not or has in another shape.
    """
    flat = paths.flatten(params, is_leaf=is_weight)
    nodes = {}
    with safe_open(path, framework="numpy") as file:
        stated, ours = (file.metadata() or {}).get(_BASE), fingerprint(params)
        if stated != ours:
            raise ValueError(
                f"{path} was made for another base: its fingerprint is {stated}, this one's "
                f"{ours}. Load the base of that run: --config and --config.base as there."
            )
        for name in file.keys():  # noqa: SIM118 - no mapping
            node = FullNode(delta=jnp.asarray(file.get_tensor(name)))
            if name not in flat:
                raise ValueError(f"{path} updates {name!r}, which the base does not have.")
            node.check(name, flat[name])
            nodes[name] = node
    return paths.nest(nodes)
