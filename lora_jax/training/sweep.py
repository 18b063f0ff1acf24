"""Many arms through one compiled step, over one copy of the base.

Arms that differ in rank, alpha, targets, learning rate and seed have states of one shape once
their deltas are padded (see `stack`), so that one executable serves them all: each in turn, or all
at once by `vmap`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.stacking import stack, unstack
from lora_jax.training.execution import Execution, single
from lora_jax.training.step import Batch, StepMetrics, TrainState
from lora_jax.transform import Delta
from lora_jax.weights import PyTree

Mode = Literal["auto", "batched", "in_turn"]
Step = Callable[[TrainState, PyTree, Batch], tuple[TrainState, StepMetrics]]
Evaluate = Callable[[Delta, PyTree, Batch], tuple[jax.Array, jax.Array]]


class Sweep(NamedTuple):
    """How a list of arms is held and moved; both ways give every arm its solo run's numbers.

    Attributes:
      pack: a list of equally shaped states to what `step` carries.
      unpack: the inverse.
      step: `(packed, base, batch, running) -> (packed, metrics)`. `running` is a bool for each arm;
        one that has stopped keeps its state. Metrics carry a leading axis of arms.
      evaluate: `(packed, base, batch) -> (loss sums, counts)`, each `[arms]`.
    """

    pack: Callable[[Sequence[TrainState]], PyTree]
    unpack: Callable[[PyTree], list[TrainState]]
    step: Callable[[PyTree, PyTree, Batch, Sequence[bool]], tuple[PyTree, StepMetrics]]
    evaluate: Callable[[PyTree, PyTree, Batch], tuple[jax.Array, jax.Array]]


def same_shapes(deltas: Sequence[Delta]) -> list[Delta]:
    """The deltas padded with zeros to common ranks and targets, so that one step serves all."""
    return unstack(stack(deltas))


def resolve_mode(mode: Mode) -> Literal["batched", "in_turn"]:
    """What "auto" means here: on a CPU arms go in turn, since its cores are busy with one and
    batched products gain nothing; elsewhere they go in one batch, which fills the machine.

    Raises:
      ValueError: for an unknown mode.
    """
    if mode not in ("auto", "batched", "in_turn"):
        raise ValueError(f"sweep mode {mode!r}: expected one of auto, batched, in_turn.")
    if mode != "auto":
        return mode
    return "in_turn" if jax.default_backend() == "cpu" else "batched"


def make_sweep(
    step: Step, evaluate: Evaluate, mode: Mode = "auto", execution: Execution | None = None
) -> Sweep:
    """Compiles `step` and `evaluate` once for all arms, in the given mode, to run as `execution`
    says: on one device unless it is given."""
    execution = execution or single()
    chosen = resolve_mode(mode)
    held = _in_turn if chosen == "in_turn" else _batched
    return held(step, evaluate, execution)


def _batched(step: Step, evaluate: Evaluate, execution: Execution) -> Sweep:
    def step_or_stay(state, base, batch, running):
        moved, metrics = step(state, base, batch)
        return jax.tree.map(functools.partial(_chosen, running), moved, state), metrics

    each_arm = functools.partial(jax.vmap, spmd_axis_name=execution.arms_axis)
    step_all = execution.step(each_arm(step_or_stay, in_axes=(0, None, None, 0)), True)
    evaluate_all = execution.evaluate(each_arm(evaluate, in_axes=(0, None, None)))

    def unpack(states: PyTree) -> list[TrainState]:
        arms = states.seed.shape[0]
        return [jax.tree.map(lambda leaf: leaf[i], states) for i in range(arms)]  # noqa: B023

    def step_batch(states, base, batch, running):
        with execution.context():
            return step_all(states, base, execution.batch(batch), jnp.asarray(running))

    def evaluate_batch(states, base, batch):
        with execution.context():
            return evaluate_all(states.delta, base, execution.batch(batch))

    return Sweep(
        pack=lambda states: execution.states(_stacked(states), True),
        unpack=unpack,
        step=step_batch,
        evaluate=evaluate_batch,
    )


def _in_turn(step: Step, evaluate: Evaluate, execution: Execution) -> Sweep:
    step_one = execution.step(step, False)
    evaluate_one = execution.evaluate(evaluate)
    stopped = StepMetrics(jnp.float32(jnp.nan), jnp.float32(jnp.nan))

    def step_each(states, base, batch, running):
        placed = execution.batch(batch)
        with execution.context():
            moved, metrics = zip(
                *(
                    step_one(state, base, placed) if runs else (state, stopped)
                    for state, runs in zip(states, running, strict=True)
                ),
                strict=True,
            )
        return list(moved), _stacked(metrics)

    def evaluate_each(states, base, batch):
        placed = execution.batch(batch)
        with execution.context():
            return _stacked([evaluate_one(state.delta, base, placed) for state in states])

    return Sweep(
        pack=lambda states: [execution.states(state, False) for state in states],
        unpack=list,
        step=step_each,
        evaluate=evaluate_each,
    )


def _chosen(running: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """`new` if `running`, else `old`, chosen on the device and left in the memory of both."""
    space = jax.typeof(old).memory_space
    if space == jax.memory.Space.Device:
        return jnp.where(running, new, old)
    new, old = (jax.device_put(x, jax.memory.Space.Device) for x in (new, old))
    return jax.device_put(jnp.where(running, new, old), space)


def _stacked(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
