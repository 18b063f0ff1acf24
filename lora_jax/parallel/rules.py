"""Sharding specs from rules: which axes of a weight are sharded over which of the mesh."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec

from lora_jax import paths
from lora_jax.targets import rule_matcher
from lora_jax.weights import PyTree, is_weight

Rules = Mapping[str, PartitionSpec]
Specs = dict[str, PartitionSpec]


def match_specs(params: PyTree, rules: Rules) -> Specs:
    """`{path: spec}` with an entry for each axis of each leaf; the first rule that matches wins.

    Args:
      params: a pytree of arrays or weights, possibly abstract.
      rules: `{target: spec}` in the language of targets: a preset, or a regular expression over
        whole components of a path. A spec names the leaf's last axes; those before it, such as
        stacked layers, are replicated.

    Raises:
      ValueError: for a leaf that no rule names, or a spec of more axes than its leaf has.
    """
    flat = paths.flatten(params, is_leaf=is_weight)
    return {path: spec_of(path, leaf, rules) for path, leaf in flat.items()}


def spec_of(path: str, leaf: Any, rules: Rules) -> PartitionSpec:
    """What `match_specs` returns for one leaf, which has a `shape`."""
    rule = next((rule for rule in rules if rule_matcher(rule)(path)), None)
    if rule is None:
        raise ValueError(
            f"no rule says how {path} is sharded. Add one such as {{{path!r}: "
            "PartitionSpec(None, 'fsdp')}, or {'.*': PartitionSpec()} at the end, which replicates "
            "the rest."
        )
    missing = len(leaf.shape) - len(rules[rule])
    if missing < 0:
        raise ValueError(
            f"rule {rule!r} gives {rules[rule]} to {path}, which has only {len(leaf.shape)} axes."
        )
    return PartitionSpec(*[None] * missing, *rules[rule])
