"""How a step is compiled, and its arguments placed on devices."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lora_jax.weights import PyTree

AXIS = "devices"  # of a pmap


class Execution(NamedTuple):
    """One way to run the same pure step.

    Attributes:
      base: places the frozen base on the devices.
      states: places a train state, or arms stacked on a leading axis (its second argument says
        which), in buffers of its own, which the first step may consume.
      batch: places a batch of host arrays on the devices.
      step: compiles `(state, base, batch, *rest) -> (state, metrics)`; it consumes the state. Its
        second argument says whether the state is that of several arms: stacked, or a tuple.
      evaluate: compiles `(delta, base, batch) -> (sum, count)`.
      gradients: compiles `(state, base, batch) -> (gradients of the delta, loss, count)`.
      change: compiles `(state, *rest) -> (state, number)`, which reads neither base nor batch. Its
        keywords are `consumes`, whether the state is, and those of `jax.jit`.
      shard_arms: inside a compiled function, shards a delta that is stacked over arms.
      context: in which compiled functions are traced and called.
      axis_name: the axis over which the step itself sums gradients, under `pmap`.
      arms_axis: the axis of the mesh over which stacked arms are sharded.
    """

    base: Callable[[PyTree], PyTree]
    states: Callable[[PyTree, bool], PyTree]
    batch: Callable[[PyTree], PyTree]
    step: Callable[[Callable, bool], Callable]
    evaluate: Callable[[Callable], Callable]
    gradients: Callable[[Callable], Callable]
    change: Callable[..., Callable]
    shard_arms: Callable[[PyTree], PyTree]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    axis_name: str | None = None
    arms_axis: str | None = None


def single() -> Execution:
    """Everything on the default device, or wherever the caller put it."""
    return Execution(
        base=_unchanged,
        states=lambda states, stacked: jax.tree.map(own_memory, states),
        batch=_unchanged,
        step=lambda step, stacked: jax.jit(step, donate_argnums=0),
        evaluate=jax.jit,
        gradients=jax.jit,
        change=change,
        shard_arms=_unchanged,
    )


def change(fn: Callable, *, consumes: bool, **options: Any) -> Callable:
    """`Execution.change` where arrays keep their devices."""
    return jax.jit(fn, donate_argnums=0 if consumes else (), **options)


def _unchanged(tree: PyTree) -> PyTree:
    return tree


def own_memory(leaf: Any) -> jax.Array:
    """The same array, where it is, in memory that no caller holds."""
    return jax.device_put(leaf, leaf.sharding, may_alias=False)
