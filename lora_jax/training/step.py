"""One step of training a delta over a frozen base, as pure functions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from lora_jax.kernels.attention import Implementation
from lora_jax.masks import mask_optimizer
from lora_jax.methods import allocate_budget, orthogonality
from lora_jax.models import llama
from lora_jax.models.config import LlamaConfig
from lora_jax.paths import described, is_known
from lora_jax.training.loss import token_losses
from lora_jax.transform import Delta, bind
from lora_jax.weights import PyTree

Batch = Mapping[str, Any]
LossSum = Callable[[Delta, PyTree, Batch, jax.Array | None], tuple[jax.Array, jax.Array]]


@flax.struct.dataclass
class TrainState:
    """All that changes while one adapter trains; a sweep stacks several on a leading axis.

    Attributes:
      delta: the adapter.
      opt_state: the optimizer's state of its trained leaves.
      step: int32, updates made.
      learning_rate: float32, the peak of the schedule.
      seed: uint32, from which each step derives its dropout key.
    """

    delta: Delta
    opt_state: PyTree
    step: jax.Array
    learning_rate: jax.Array
    seed: jax.Array


@flax.struct.dataclass
class StepMetrics:
    """Of one step: the mean loss before the update, in nats a token, and the gradient's norm."""

    loss: jax.Array
    grad_norm: jax.Array


def init_state(
    delta: Delta, tx: optax.GradientTransformation, *, learning_rate: float, seed: int
) -> TrainState:
    """The state before the first step. `tx` moves what `trainable_mask(delta)` allows.

    Raises:
      ValueError: for a seed that is no integer of 32 bits.
    """
    return TrainState(
        delta=delta,
        opt_state=mask_optimizer(tx, delta).init(delta),
        step=jnp.int32(0),
        learning_rate=jnp.float32(learning_rate),
        seed=_seed(seed),
    )


def _seed(seed: Any) -> jax.Array:
    whole = jnp.issubdtype(jnp.result_type(seed), jnp.integer) and jnp.ndim(seed) == 0
    if not whole or (is_known(seed) and not 0 <= int(seed) < 2**32):
        raise ValueError(
            f"seed={described(seed)}: expected an integer from 0 to 2**32 - 1, not a key: each "
            "step makes its own, jax.random.key(seed) and the step folded in."
        )
    return jnp.asarray(seed, jnp.uint32)


def llama_loss(
    config: LlamaConfig,
    *,
    remat: llama.Remat = "elementwise",
    unroll: int = 1,
    chunk: int = 128,
    attention: Implementation | None = None,
) -> LossSum:
    """The summed loss over a batch's counted tokens, and their number.

    A batch holds `tokens`, `targets`, `loss_mask`, `segment_ids` and `positions`, each `[B, T]`.
    `unroll` and `attention` are of `hidden_states`, `chunk` of `token_losses`.
    """

    def loss_sum(delta, base, batch, dropout_key):
        weights = bind(base, delta, dropout_key=dropout_key)
        hidden = llama.hidden_states(
            weights,
            batch["tokens"],
            config,
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            remat=remat,
            unroll=unroll,
            attention=attention,
        )
        head = llama.output_head(weights)
        return token_losses(hidden, head, batch["targets"], batch["loss_mask"], chunk=chunk)

    return loss_sum


def train_step(
    loss_sum: LossSum,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    correct: optax.GradientTransformation | None = None,
    axis_name: str | None = None,
) -> Callable[[TrainState, PyTree, Batch], tuple[TrainState, StepMetrics]]:
    """A pure function `(state, base, batch) -> (state, metrics)`, to be jitted, vmapped or pmapped.

    AdaLoRA's term of the loss and its allocation are part of it; its term is not in the metrics.

    Args:
      loss_sum: gives a batch's summed loss and its count, such as `llama_loss(config)`.
      tx: the optimizer; if its update takes `learning_rate`, it gets the state's.
      accumulate: into how many micro-batches the batch is cut. Their losses are summed before
        they are divided, so that the result is the whole batch's, however tokens fall.
      correct: a transformation without state that reads frozen leaves too, and so stands in front
        of the mask: LoRA-FA's `project_b()`.
      axis_name: of a `pmap` or `shard_map` whose devices hold parts of the batch; sums go over it
        before they are divided. Each device draws dropout of its own.
    """

    def step(state: TrainState, base: PyTree, batch: Batch) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        sums = _summed_gradients(loss_sum, state.delta, base, batch, key, accumulate)
        total, count, grads = sums if axis_name is None else jax.lax.psum(sums, axis_name)
        grads = jax.tree.map(lambda g: g / count, grads)
        corrected = grads
        if correct is not None:
            corrected, _ = correct.update(grads, correct.init(state.delta), state.delta)
        masked = optax.with_extra_args_support(mask_optimizer(tx, state.delta))
        updates, opt_state = masked.update(
            corrected, state.opt_state, state.delta, learning_rate=state.learning_rate
        )
        delta = optax.apply_updates(state.delta, updates)
        moved = dataclasses.replace(
            state,
            delta=allocate_budget(delta, grads, state.step + 1),
            opt_state=opt_state,
            step=state.step + 1,
        )
        return moved, StepMetrics(total / count, optax.tree.norm(grads))

    return step


def _summed_gradients(loss_sum, delta, base, batch, key, accumulate):
    def objective(delta, micro, key):
        total, count = loss_sum(delta, base, micro, key)
        return total + count * orthogonality(delta), (total, count)

    gradient = jax.grad(objective, has_aux=True)
    if accumulate == 1:
        grads, (total, count) = gradient(delta, batch, key)
        return total, count, grads
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % accumulate:
        raise ValueError(f"accumulate={accumulate} does not divide the batch of {rows} rows.")
    micros = jax.tree.map(lambda x: x.reshape(accumulate, rows // accumulate, *x.shape[1:]), batch)

    def add(sums, inputs):
        micro, micro_key = inputs
        grads, (total, count) = gradient(delta, micro, micro_key)
        return jax.tree.map(jnp.add, sums, (total, count, grads)), None

    zeros = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, delta))
    sums, _ = jax.lax.scan(add, zeros, (micros, jax.random.split(key, accumulate)))
    return sums
