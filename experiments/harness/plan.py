"""The parameters and memory of a sweep, from shapes alone."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import lora_jax as lora
from experiments.harness.arms import AnyMethod, Arm
from experiments.harness.setup import as_configured, shape_of
from lora_jax import models
from lora_jax.tables import aligned
from lora_jax.targets import Targets
from lora_jax.weights import PyTree, is_weight

GB = 1e9


def abstract_params(config: ConfigDict) -> PyTree:
    """The shapes of the configured model's params; nothing is allocated."""
    shape, dtype = shape_of(config), jnp.dtype(config.model.dtype)

    def make(key):
        return as_configured(config, models.init(shape, key=key, dtype=dtype))

    return jax.eval_shape(make, jax.random.key(0))


def describe_arm(params: PyTree, method: AnyMethod, targets: Targets) -> lora.Description:
    """The counts of one arm over abstract params."""

    def transform(params, key):
        return lora.lora_transform(params, method, targets=targets, key=key)

    base, delta = jax.eval_shape(transform, params, jax.random.key(0))
    return lora.describe(base, delta, method, targets=targets)


def params_per_rank(config: ConfigDict) -> dict[str, int]:
    """The trainable parameters of each target preset of the ablation at rank 1."""
    params = abstract_params(config)
    return {
        targets: describe_arm(params, lora.LoRA(rank=1), targets).trainable_params
        for targets in config.ablation.targets
    }


def plan(config: ConfigDict, arms: Sequence[Arm]) -> str:
    """A table of parameters and memory, an arm a line.

    Memory is that of arrays that live for all of the run: the base, and float32 deltas with their
    gradient and two moments of Adam. Activations are not counted.
    """
    params = abstract_params(config)
    base = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    rows: list[tuple[str, ...]] = [
        ("arm", "trainable", "%", "delta GB", "with Adam GB", "with the base GB")
    ]
    for arm in arms:
        counts = describe_arm(params, arm.method, arm.targets)
        delta = counts.trainable_params * 4
        sizes = (delta, 4 * delta, 4 * delta + base)
        rows.append(
            (
                arm.name,
                f"{counts.trainable_params:,}",
                f"{counts.trainable_percent:.3f}",
                *(f"{size / GB:.2f}" for size in sizes),
            )
        )
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params, is_leaf=is_weight))
    format = config.base.quantize
    stored = config.model.dtype if format == "none" else f"{config.model.dtype} and {format}"
    head = (
        f"{config.name} ({config.model.shape}): {total:,} parameters, {base / GB:.2f} GB in "
        f"{stored}; full fine-tuning in float32 with Adam would take "
        f"{total * 16 / GB:.0f} GB. Activations come on top."
    )
    return f"{head}\n\n{aligned(rows)}"
