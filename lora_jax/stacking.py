"""Several deltas as one, along a leading axis: for sweeps by `vmap`, and to serve many."""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from lora_jax import paths
from lora_jax.methods import DeltaNode
from lora_jax.transform import Delta, delta_nodes


def stack(deltas: Sequence[Delta]) -> Delta:
    """One delta whose leaves carry a leading axis, an entry for each of `deltas`.

    Sizes are padded with zeros to the largest, and a path that a delta does not adapt gets a node
    that changes nothing. Both are exact in value, and the gradient of all padding is zero (not that
    of an absent `Full` delta, which a step of your own must leave alone). Throughout training they
    are exact
      - in `training.make_sweep`, whatever the optimizer: it moves each delta in its own shapes;
      - in a step of your own under `vmap`, with an optimizer that moves each entry by itself, or
        scales by norms, to which zeros add nothing: SGD, Adam(W) and its kin, AdaBelief, Adan,
        Adagrad, RMSProp, Lion, sign SGD, LARS, LAMB, Prodigy, a clip by value or by global norm;
      - not so with one that reads a leaf's shape: Adafactor (a mean over the leaf) and
        `clip_by_block_rms`, Muon (its scale by fan-in); nor with Yogi, whose first moments are not
        zero, or with noise. Update `unstack(gradients, like=deltas)` one by one instead.
    The deltas may differ
      - in size: LoRA, DoRA and Bottleneck;
      - in targets: these, IA3 and Full, and VeRA where the largest target is of one size;
      - in what arrays hold: alpha, the scaling, any init.
    All else must agree on a path: dropout, `train_a`, IA3's side, VeRA's rank and every setting of
    AdaLoRA, prompts, prefixes and fusions, which take the same targets too.

    Raises:
      ValueError: for no delta; naming the path, for different methods there, or different settings
        of one; for sizes that cannot be padded; for a delta without a path of a method that has no
        neutral value.
    """
    if not deltas:
        raise ValueError("stack needs at least one delta.")
    nodes_of = [delta_nodes(delta) for delta in deltas]
    widest: dict[str, DeltaNode] = {}
    for nodes in nodes_of:
        for path, node in nodes.items():
            widest[path] = _wider(path, widest.get(path, node), node)
    stacked = {path: _stack_nodes(path, like, nodes_of) for path, like in widest.items()}
    return paths.nest(stacked)


def unstack(stacked: Delta, like: Sequence[Delta] | None = None) -> list[Delta]:
    """The deltas that `stack(deltas)` holds.

    Args:
      stacked: what `stack` returned, possibly trained.
      like: the deltas that were stacked (or their shapes), to which padding and absent paths are
        cut back. Without it every delta keeps the largest rank and all paths.

    Raises:
      ValueError: if `like` has another number of deltas.
    """
    count = jax.tree.leaves(stacked)[0].shape[0]
    deltas = [jax.tree.map(lambda leaf: leaf[i], stacked) for i in range(count)]  # noqa: B023
    if like is None:
        return deltas
    if len(like) != count:
        raise ValueError(f"the stack holds {count} deltas, but `like` lists {len(like)}.")
    return [_trimmed(delta, shapes) for delta, shapes in zip(deltas, like, strict=True)]


def _trimmed(delta: Delta, like: Delta) -> Delta:
    nodes = delta_nodes(delta)
    return paths.nest({path: nodes[path].trimmed(node) for path, node in delta_nodes(like).items()})


def _wider(path: str, one: DeltaNode, other: DeltaNode) -> DeltaNode:
    one, other = one.matched(other), other.matched(one)
    structures: Any = jax.tree.structure(one), jax.tree.structure(other)
    if structures[0] != structures[1]:
        raise ValueError(
            f"{path}: cannot stack {_described(one)} with {_described(other)}: one path takes one "
            "method, with one dropout rate, one layout and one base."
        )
    return other if (other.rank or 0) > (one.rank or 0) else one


def _stack_nodes(path: str, like: DeltaNode, deltas: list[dict[str, DeltaNode]]) -> DeltaNode:
    nodes = [d[path].padded(like) if path in d else like.absent() for d in deltas]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *nodes)


def _described(node: DeltaNode) -> str:
    static = [
        f"{field.name}={getattr(node, field.name)!r}"
        for field in dataclasses.fields(cast(Any, node))
        if not field.metadata.get("pytree_node", True)
        and getattr(node, field.name) != field.default
    ]
    return f"{type(node).__name__}({', '.join(static)})"
