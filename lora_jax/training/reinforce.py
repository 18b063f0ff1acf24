"""A step of reinforcement learning: answers from the current policy, then updates on them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.training.execution import Execution, single
from lora_jax.training.losses.loss import Batch
from lora_jax.training.losses.target_log_probs import TargetLogProbs
from lora_jax.training.rewards import Example
from lora_jax.training.rollouts import RollOut, Rollout
from lora_jax.training.rounding import tolerance_of
from lora_jax.training.step import StepMetrics, TrainState, TrainStep
from lora_jax.transform import bind
from lora_jax.weights import PyTree

PolicyStep = Callable[
    [TrainState, PyTree, Sequence[Example]], tuple[TrainState, StepMetrics, Rollout]
]
_SAMPLING = 0x70_6F_6C  # folded into the key: dropout has the one without


def policy_step(
    step: TrainStep,
    roll_out: RollOut,
    read: TargetLogProbs,
    *,
    updates: int = 1,
    tolerance: float | None = None,
    execution: Execution | None = None,
) -> PolicyStep:
    """The function `(state, base, examples) -> (state, metrics, rollout)`.

    Answers are sampled by `state.delta`, the policy that the first update starts from, with a key
    that follows from the state's seed and step: a resumed run samples the same ones. Before it, the
    probabilities that the sampler saw are compared with the trainer's. It consumes the state.

    Args:
      step: from `train_step(grpo_loss(config, ...), tx)`.
      roll_out: from `make_rollout`.
      read: from `target_log_probs(config, temperature=...)`, with the temperature of both.
      updates: how many to make on the same answers; from the second on, clipping matters.
      tolerance: by how many nats a token, on average, sampler and trainer may differ; None takes
        `tolerance_of(base)`: a lag of one step can hide in the roundings of bfloat16.
      execution: how the step runs; None on one device.

    Raises:
      ValueError: for fewer than one update. The function raises it where sampler and trainer
        differ, and as `make_rollout`.
    """
    if updates < 1:
        raise ValueError(f"updates={updates}: expected at least 1.")
    execution = execution or single()
    run = execution.step(step, False)
    trainer = jax.jit(lambda delta, base, batch: read(bind(base, delta), batch))

    def step_policy(state, base, examples):
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        with execution.context():
            rollout = roll_out(state.delta, base, examples, jax.random.fold_in(key, _SAMPLING))
            placed = execution.batch(rollout.batch)
            most = tolerance_of(base) if tolerance is None else tolerance
            require_current(trainer(state.delta, base, rollout.batch), rollout.batch, most)
            for _ in range(updates):
                state, metrics = run(state, base, placed)
        return state, metrics, rollout

    return step_policy


def require_current(log_probs: Any, batch: Batch, tolerance: float) -> None:
    """Checks that answers were sampled by the policy whose `log_probs` these are.

    Raises:
      ValueError: for a mean difference a token of more than `tolerance` nats: the sampler lags
        behind the trainer, or runs in another dtype or at another temperature.
    """
    counted = np.asarray(batch["loss_mask"])
    gaps = np.abs(np.asarray(log_probs) - np.asarray(batch["sampler_log_probs"]))
    mean = np.where(counted, gaps, 0).sum() / max(counted.sum(), 1)
    if not mean <= tolerance:
        raise ValueError(
            f"sampler and trainer differ by {mean:.3g} nats a token, more than {tolerance:g}: the "
            "answers were sampled by another policy than the one that learns from them, such as "
            "that of a step before, in another dtype, or at another temperature."
        )
