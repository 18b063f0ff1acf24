"""One step of training a delta over a frozen base, as pure functions."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from lora_jax.masks import mask_optimizer
from lora_jax.paths import described, is_known
from lora_jax.training.losses.loss import Batch, LossSum
from lora_jax.training.node_hooks import after_update, penalty
from lora_jax.training.optimizers import with_learning_rate
from lora_jax.training.rows import rows_of
from lora_jax.transform import Delta
from lora_jax.weights import PyTree


@flax.struct.dataclass
class TrainState:
    """All that changes while one adapter trains; a sweep stacks several on a leading axis.

    Attributes:
      delta: the adapter.
      opt_state: the optimizer's state of its trained leaves, its learning rate included.
      step: int32, updates made.
      seed: uint32, from which each step derives its dropout key.
      settings: what the loss is called with by keyword, such as DPO's beta; nothing moves them.
    """

    delta: Delta
    opt_state: PyTree
    step: jax.Array
    seed: jax.Array
    settings: Mapping[str, Any] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class StepMetrics:
    """Of one step, before its update.

    Attributes:
      loss: the mean over counted units, such as nats a token; 0 where none counted.
      grad_norm: of its gradient.
      count: the units; None for a step that does not report them.
    """

    loss: jax.Array
    grad_norm: jax.Array
    count: jax.Array | None = None


def init_state(
    delta: Delta,
    tx: optax.GradientTransformation,
    *,
    learning_rate: float | None = None,
    seed: int,
    settings: Mapping[str, Any] | None = None,
) -> TrainState:
    """The state before the first step. `tx` moves what `trainable_mask(delta)` allows.

    Args:
      delta: the adapter.
      tx: the optimizer, such as `training.optimizer("adamw", steps=100)`.
      learning_rate: set in the optimizer's state; None leaves the optimizer's own.
      seed: of dropout.
      settings: what the loss is called with by keyword, `loss.settings_of(beta=0.3)`; None leaves
        the loss's own.

    Raises:
      ValueError: for a rate, where the optimizer keeps none in its state, or a seed that is not
        an integer of 32 bits.
    """
    opt_state = mask_optimizer(tx, delta).init(delta)
    if learning_rate is not None:
        opt_state = with_learning_rate(opt_state, learning_rate)
    return TrainState(
        delta=delta,
        opt_state=opt_state,
        step=jnp.int32(0),
        seed=_seed(seed),
        settings=jax.tree.map(jnp.asarray, dict(settings or {})),
    )


def _seed(seed: Any) -> jax.Array:
    is_integer = jnp.issubdtype(jnp.result_type(seed), jnp.integer) and jnp.ndim(seed) == 0
    if not is_integer or (is_known(seed) and not 0 <= int(seed) < 2**32):
        raise ValueError(
            f"seed={described(seed)}: expected an integer from 0 to 2**32 - 1, not a key: each "
            "step makes its own, jax.random.key(seed) and the step folded in."
        )
    return jnp.asarray(seed, jnp.uint32)


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A pure function `(state, base, batch) -> (state, metrics)`, and the two that compose it.

    Attributes:
      gradients: `(state, base, batch) -> (gradients, loss, count)`; reads no optimizer state.
      update: `(state, gradients) -> (state, gradients' norm)`; reads no base.
    """

    gradients: Callable[[TrainState, PyTree, Batch], tuple[Delta, jax.Array, jax.Array]]
    update: Callable[[TrainState, Delta], tuple[TrainState, jax.Array]]

    __name__ = "step"  # of the compiled program

    def __call__(
        self, state: TrainState, base: PyTree, batch: Batch
    ) -> tuple[TrainState, StepMetrics]:
        gradients, loss, count = self.gradients(state, base, batch)
        moved, norm = self.update(state, gradients)
        return moved, StepMetrics(loss, norm, count)


def train_step(
    loss_sum: LossSum,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    correct: optax.GradientTransformation | None = None,
    axis_name: str | None = None,
) -> TrainStep:
    """A pure function `(state, base, batch) -> (state, metrics)`, to be jitted, vmapped or pmapped.

    The loss is a mean over counted units. A batch in which none counts has the loss 0 and gradients
    of zero; a part of it (a micro-batch, a device's rows) in which none counts adds nothing,
    whatever `loss_sum` and its gradient are there.

    It includes what methods declare beside their gradients (`DeltaNode.penalty`, `after_update`),
    as AdaLoRA does; a penalty is not in the metrics.

    Args:
      loss_sum: gives a batch's summed loss and its count: a `Loss`, such as
        `next_token_loss(config)`, or any function `(delta, base, batch, dropout_key)`, which gets
        the state's settings by keyword.
      tx: the optimizer.
      accumulate: into how many micro-batches the batch is cut. Their losses are summed before
        they are divided, so that the result is that of the full batch, however its tokens
        are distributed.
      correct: a transformation without state that reads frozen leaves too, and so comes before
        the mask: LoRA-FA's `project_b()`.
      axis_name: of a `pmap` or `shard_map` whose devices hold parts of the batch; sums go over it
        before they are divided. Each device has its own dropout.
    """

    def gradients(state: TrainState, base: PyTree, batch: Batch):
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        of_state = functools.partial(loss_sum, **state.settings) if state.settings else loss_sum
        sums = _summed_gradients(of_state, state.delta, base, batch, key, accumulate)
        total, count, grads = sums if axis_name is None else jax.lax.psum(sums, axis_name)
        divisor = jnp.where(count > 0, count, 1)
        return jax.tree.map(lambda g: g / divisor, grads), total / divisor, count

    def update(state: TrainState, grads: Delta):
        corrected = grads
        if correct is not None:
            corrected, _ = correct.update(grads, correct.init(state.delta), state.delta)
        masked = mask_optimizer(tx, state.delta)
        updates, opt_state = masked.update(corrected, state.opt_state, state.delta)
        delta = optax.apply_updates(state.delta, updates)
        moved = dataclasses.replace(
            state,
            delta=after_update(delta, grads, state.step + 1),
            opt_state=opt_state,
            step=state.step + 1,
        )
        return moved, optax.tree.norm(grads)

    return TrainStep(gradients, update)


def _summed_gradients(loss_sum, delta, base, batch, key, accumulate):
    def objective(delta, micro, key):
        total, count = loss_sum(delta, base, micro, key)
        added = penalty(delta)
        return total if added is None else total + count * added, (total, count)

    def gradient(micro, key):
        grads, (total, count) = jax.grad(objective, has_aux=True)(delta, micro, key)
        counted = lambda x: jnp.where(count > 0, x, jnp.zeros_like(x))  # noqa: E731
        return counted(total), count, jax.tree.map(counted, grads)

    if accumulate == 1:
        return gradient(batch, key)
    rows = rows_of(batch)
    if rows % accumulate:
        raise ValueError(f"accumulate={accumulate} does not divide the batch of {rows} rows.")
    micros = jax.tree.map(lambda x: x.reshape(accumulate, rows // accumulate, *x.shape[1:]), batch)

    def add(sums, inputs):
        return jax.tree.map(jnp.add, sums, gradient(*inputs)), None

    zeros = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, delta))
    sums, _ = jax.lax.scan(add, zeros, (micros, jax.random.split(key, accumulate)))
    return sums
