"""Many arms through one compiled step, over one copy of the base.

Arms that differ in rank, alpha, targets, learning rate and seed have deltas of one shape once they
are padded (see `stack`), so that one executable computes the gradients of all: of each in turn, or
of all at once by `vmap`. Their optimizers move each arm in its own shapes, since for some
(Adafactor, Muon) padding is not neutral; where all arms have the same shapes, that is one program.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.stacking import stack, unstack
from lora_jax.training.execution import Execution, single
from lora_jax.training.losses.loss import Batch
from lora_jax.training.step import StepMetrics, TrainState, TrainStep
from lora_jax.transform import Delta
from lora_jax.weights import PyTree

Mode = Literal["auto", "batched", "in_turn"]
Evaluate = Callable[..., tuple[jax.Array, jax.Array]]  # (delta, base, batch, **settings)


class Sweep(NamedTuple):
    """How a list of arms is stored and moved; both modes give every arm the numbers of a solo run.

    Attributes:
      pack: a list of states, each in its own shapes, to what `step` carries.
      unpack: the inverse.
      step: `(packed, base, batch, running) -> (packed, metrics)`. `running` is a bool for each arm;
        one that has stopped keeps its state. Metrics carry a leading axis of arms.
      evaluate: `(packed, base, batch) -> (loss sums, counts)`, each `[arms]`, of each arm with its
        own settings.
    """

    pack: Callable[[Sequence[TrainState]], PyTree]
    unpack: Callable[[PyTree], list[TrainState]]
    step: Callable[[PyTree, PyTree, Batch, Sequence[bool]], tuple[PyTree, StepMetrics]]
    evaluate: Callable[[PyTree, PyTree, Batch], tuple[jax.Array, jax.Array]]


def same_shapes(deltas: Sequence[Delta]) -> list[Delta]:
    """The deltas padded with zeros to common ranks and targets, so that one step serves all."""
    return unstack(stack(deltas))


def alike(states: Sequence[PyTree]) -> bool:
    """Whether all are of one structure and the same shapes."""
    first, *others = [(jax.tree.structure(s), jax.tree.map(jnp.shape, s)) for s in states]
    return all(other == first for other in others)


def resolve_mode(mode: Mode) -> Literal["batched", "in_turn"]:
    """What "auto" means here: on a CPU arms run in turn, since one arm keeps its cores busy and
    batched products gain nothing; elsewhere they run in one batch, which fills the device.

    Raises:
      ValueError: for an unknown mode.
    """
    if mode not in ("auto", "batched", "in_turn"):
        raise ValueError(f"sweep mode {mode!r}: expected one of auto, batched, in_turn.")
    if mode != "auto":
        return mode
    return "in_turn" if jax.default_backend() == "cpu" else "batched"


def make_sweep(
    step: TrainStep, evaluate: Evaluate, mode: Mode = "auto", execution: Execution | None = None
) -> Sweep:
    """Compiles `step` and `evaluate` once for all arms, in the given mode, to run as `execution`
    says: on one device unless it is given."""
    execution = execution or single()
    chosen = resolve_mode(mode)
    make = _in_turn if chosen == "in_turn" else _batched
    return make(step, evaluate, execution)


def batched_step(step: TrainStep, execution: Execution) -> Callable:
    """The compiled `(packed, base, batch, running) -> (packed, metrics)` of all arms at once, where
    packed is one state with a leading axis of arms, or a tuple of states in shapes of their own."""
    each_arm = functools.partial(jax.vmap, spmd_axis_name=execution.arms_axis)

    def step_or_stay(state, base, batch, running):
        moved, metrics = step(state, base, batch)
        return jax.tree.map(functools.partial(_chosen, running), moved, state), metrics

    def step_alike(states, base, batch, running):
        return each_arm(step_or_stay, in_axes=(0, None, None, 0))(states, base, batch, running)

    def step_apart(states, base, batch, running):
        deltas = [state.delta for state in states]
        together = TrainState(
            delta=execution.shard_arms(stack(deltas)),
            opt_state=(),
            step=jnp.stack([state.step for state in states]),
            seed=jnp.stack([state.seed for state in states]),
            settings=_stacked([state.settings for state in states]),
        )
        gradients = each_arm(step.gradients, in_axes=(0, None, None))
        grads, losses, counts = gradients(together, base, batch)
        own = unstack(grads, like=deltas)
        moved, norms = zip(*map(step.update, states, own), strict=True)
        kept = [
            jax.tree.map(functools.partial(_chosen, runs), new, old)
            for runs, new, old in zip(running, moved, states, strict=True)
        ]
        return tuple(kept), StepMetrics(losses, jnp.stack(norms), counts)

    def step_all(states, base, batch, running):
        step_arms = step_apart if isinstance(states, tuple) else step_alike
        return step_arms(states, base, batch, running)

    return execution.step(step_all, True)


def _batched(step: TrainStep, evaluate: Evaluate, execution: Execution) -> Sweep:
    step_all = batched_step(step, execution)
    each_arm = functools.partial(jax.vmap, spmd_axis_name=execution.arms_axis)

    def evaluate_arms(arms, base, batch):
        deltas, settings = arms
        if isinstance(deltas, list):
            deltas, settings = execution.shard_arms(stack(deltas)), _stacked(settings)
        return each_arm(of_arm, in_axes=(0, None, None))((deltas, settings), base, batch)

    of_arm = _of_arm(evaluate)
    evaluate_all = execution.evaluate(evaluate_arms)

    def pack(states: Sequence[TrainState]) -> PyTree:
        _require_same_settings(states)
        if alike(states):
            return execution.states(_stacked(states), True)
        return tuple(execution.states(state, False) for state in states)

    def step_batch(states, base, batch, running):
        with execution.context():
            return step_all(states, base, execution.batch(batch), jnp.asarray(running))

    def evaluate_batch(states, base, batch):
        with execution.context():
            arms = deltas_of(states), _settings_of(states)
            return evaluate_all(arms, base, execution.batch(batch))

    def unpack(states: PyTree) -> list[TrainState]:
        return list(states) if isinstance(states, tuple) else arms_of(states, states.seed.shape[0])

    return Sweep(pack=pack, unpack=unpack, step=step_batch, evaluate=evaluate_batch)


def _in_turn(step: TrainStep, evaluate: Evaluate, execution: Execution) -> Sweep:
    step_one = execution.step(step, False)
    evaluate_one = execution.evaluate(_of_arm(evaluate))
    apart = _Apart(step, execution)
    stopped = StepMetrics(jnp.float32(jnp.nan), jnp.float32(jnp.nan), jnp.float32(0))

    def step_each(states, base, batch, running):
        placed, same = execution.batch(batch), alike(states)
        moved, metrics = list(states), [stopped] * len(states)
        with execution.context():
            for i in (i for i, runs in enumerate(running) if runs):
                if same:
                    moved[i], metrics[i] = step_one(states[i], base, placed)
                else:
                    moved[i], metrics[i] = apart.step(moved, i, base, placed)
        return moved, _stacked(metrics)

    def evaluate_each(states, base, batch):
        placed, same = execution.batch(batch), alike(states)
        with execution.context():
            deltas = [
                state.delta if same else apart.padded(states, i).delta
                for i, state in enumerate(states)
            ]
            arms = zip(deltas, _settings_of(states), strict=True)
            return _stacked([evaluate_one(arm, base, placed) for arm in arms])

    def pack(states: Sequence[TrainState]) -> PyTree:
        _require_same_settings(states)
        return [execution.states(state, False) for state in states]

    return Sweep(
        pack=pack,
        unpack=list,
        step=step_each,
        evaluate=evaluate_each,
    )


class _Apart:
    """A step of one of several arms of different shapes: gradients by the one program of all, over
    the padded delta, and an update by a small program of its own."""

    def __init__(self, step: TrainStep, execution: Execution):
        def pad(states, index):
            delta = same_shapes([state.delta for state in states])[index]
            return dataclasses.replace(states[index], delta=delta, opt_state=()), None

        def update(state, grads):
            return step.update(state, _cut(grads, state.delta))

        self._pad = execution.change(pad, consumes=False, static_argnums=1)
        self._gradients = execution.gradients(step.gradients)
        self._update = execution.change(update, consumes=True)

    def padded(self, states: Sequence[TrainState], index: int) -> TrainState:
        """The state at `index`, without its optimizer's, in the shapes that all arms can share."""
        return self._pad([dataclasses.replace(s, opt_state=()) for s in states], index)[0]

    def step(self, states: Sequence[TrainState], index: int, base: PyTree, batch: Batch):
        grads, loss, count = self._gradients(self.padded(states, index), base, batch)
        moved, norm = self._update(states[index], grads)
        return moved, StepMetrics(loss, norm, count)


def deltas_of(packed: PyTree) -> PyTree:
    """The deltas of a sweep's packed states: a list, or one delta with a leading axis of arms."""
    if isinstance(packed, list | tuple):
        return [state.delta for state in packed]
    return packed.delta


def _settings_of(packed: PyTree) -> PyTree:
    """The settings of a sweep's packed states, as `deltas_of` returns the deltas."""
    if isinstance(packed, list | tuple):
        return [state.settings for state in packed]
    return packed.settings


def _of_arm(evaluate: Evaluate) -> Callable:
    """`evaluate` of `((delta, settings), base, batch)`: all that it takes by place."""

    def of_arm(arm, base, batch):
        delta, settings = arm
        return evaluate(delta, base, batch, **settings)

    return of_arm


def _require_same_settings(states: Sequence[TrainState]) -> None:
    first, *others = [sorted(state.settings) for state in states]
    for index, names in enumerate(others, start=1):
        if names != first:
            raise ValueError(
                f"arm {index} has settings of its own for {', '.join(names) or 'nothing'}, arm 0 "
                f"for {', '.join(first) or 'nothing'}: one step serves all arms, so give every "
                "arm a value of each."
            )


def arms_of(tree: PyTree, count: int) -> list[Any]:
    """The trees of each arm, of a list of them or of one with a leading axis."""
    if isinstance(tree, list):
        return tree
    return [jax.tree.map(lambda leaf: leaf[i], tree) for i in range(count)]  # noqa: B023


def copied(deltas: PyTree) -> PyTree:
    """The same in buffers of their own, which no step consumes."""
    return jax.tree.map(jnp.copy, deltas)


def chosen(better: Sequence[bool], new: PyTree, old: PyTree) -> PyTree:
    """Each arm's delta copied from `new` where it is better, else that of `old`; both are what
    `deltas_of` returns."""
    if isinstance(new, list):
        pairs = zip(better, new, old, strict=True)
        return [copied(ours) if wins else theirs for wins, ours, theirs in pairs]
    return _chosen_arms(jnp.asarray(better), new, old)


@jax.jit
def _chosen_arms(better: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    def of_arm(wins, ours, theirs):
        return jax.tree.map(functools.partial(_chosen, wins), ours, theirs)

    return jax.vmap(of_arm)(better, new, old)


def _cut(grads: Delta, like: Delta) -> Delta:
    [own] = unstack(jax.tree.map(lambda leaf: leaf[None], grads), like=[like])
    return own


def _chosen(running: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """`new` if `running`, else `old`, chosen on the device and kept in the memory space of both."""
    space = jax.typeof(old).memory_space
    if space == jax.memory.Space.Device:
        return jnp.where(running, new, old)
    new, old = (jax.device_put(x, jax.memory.Space.Device) for x in (new, old))
    return jax.device_put(jnp.where(running, new, old), space)


def _stacked(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
