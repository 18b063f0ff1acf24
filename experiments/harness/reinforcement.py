"""What arms learn from rewards: prompts as batches, and a step that samples its own answers.

The loss of a run is what its rewards lack, 1 - r, a mean over answers: that of a step is of the
answers that it learns from, that of a validation is of answers to the prompts that are held out.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.harness import devices, losses, setup
from experiments.harness.arms import Arm
from experiments.harness.measures import Measured, Measures, Numbers
from experiments.harness.shared import Log, Shared, Task, step_of
from lora_jax.interop import Pretrained
from lora_jax.training import target_log_probs
from lora_jax.training.execution import Execution
from lora_jax.training.losses.loss import Loss
from lora_jax.training.reinforce import policy_step
from lora_jax.training.resuming import digest
from lora_jax.training.rewards import Example, Reward
from lora_jax.training.rollouts import RollOut, Rollout, Sampling, make_rollout, prompt_text
from lora_jax.training.step import StepMetrics
from lora_jax.training.sweep import Sweep
from lora_jax.transform import Delta
from lora_jax.weights import PyTree

LOSSES = ("grpo", "dr_grpo")
REWARD, TOKENS = "reward", "tokens an answer"
_HELD_OUT = 0x68_65_6C  # the key of the answers to prompts that are held out
_QUIET = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewarded:
    """A task whose answers a function can tell the worth of.

    Attributes:
      train, held_out: examples, as `make_rollout` has them, each with its right `answer`.
      reward: from 0 to 1.
    """

    train: Sequence[Example]
    held_out: Sequence[Example]
    reward: Reward


def require_possible(config: ConfigDict) -> None:
    """Raises ValueError for a loss without rollouts, for several devices, or where no batch of
    prompts can be validated."""
    if config.train.loss not in LOSSES:
        raise ValueError(
            f"config.train.loss={config.train.loss!r}: expected one of {', '.join(LOSSES)}, which "
            "learn from rewards. The configuration of this experiment is configs/reinforce.py."
        )
    if config.parallel.mode != "single" or config.train.accumulate != 1:
        raise ValueError(
            "experiments/reinforce.py samples and learns on one device, a batch at once: leave "
            "config.parallel.mode at single and config.train.accumulate at 1."
        )
    if not 1 <= config.reinforce.prompts <= config.data.validation_examples:
        raise ValueError(
            f"config.reinforce.prompts={config.reinforce.prompts}: expected at least 1, and at "
            f"most config.data.validation_examples={config.data.validation_examples}."
        )


def loading(rewarded: Rewarded) -> Callable[[ConfigDict, Path, Log], Shared]:
    """How model and task are loaded, as `Study.load` has it."""

    def load(config: ConfigDict, workdir: Path, log: Log) -> Shared:
        require_possible(config)
        log({"event": "loading", "what": f"model {config.model.source}"})
        return _over(config, setup.load_model(config), workdir, log, rewarded)

    return load


def measures(rewarded: Rewarded) -> Measures:
    """The mean reward of sampled answers to the prompts that are held out, how many get a full one,
    and their tokens."""

    def of(shared: Shared) -> Measured:
        roll_out = make_roll_out(shared.config, shared.model, rewarded)
        parts = _indices(len(rewarded.held_out), shared.config.reinforce.prompts)

        def measured(delta: Delta) -> Numbers:
            found = [
                roll_out(
                    delta,
                    shared.model.params,
                    [rewarded.held_out[i] for i in part["example"]],
                    _key(part),
                )
                for part in parts
            ]
            rewards = np.concatenate([rollout.rewards for rollout in found])
            lengths = [float(rollout.lengths.mean()) for rollout in found]
            return {
                REWARD: float(np.nanmean(rewards)),
                "full reward": float((rewards == 1).mean()),
                TOKENS: statistics.fmean(lengths),
            }

        return measured

    return Measures(of=of, names=(REWARD, "full reward", TOKENS), compared=REWARD)


def make_roll_out(config: ConfigDict, model: Pretrained, rewarded: Rewarded) -> RollOut:
    """The function that samples answers and takes their rewards."""
    settings, tokenizer = config.reinforce, model.tokenizer
    longest = max(
        len(tokenizer.encode(prompt_text(example, tokenizer)))
        for example in (*rewarded.train, *rewarded.held_out)
    )
    sampling = Sampling(
        group=settings.group,
        prompt_tokens=longest,
        new_tokens=settings.new_tokens,
        temperature=settings.temperature,
        scale=config.train.loss == "grpo",
        on_error=settings.on_error,
    )
    return make_rollout(model.config, tokenizer, rewarded.reward, sampling)


def _over(
    config: ConfigDict, model: Pretrained, workdir: Path, log: Log, rewarded: Rewarded
) -> Shared:
    settings = config.reinforce
    loss = losses.make_loss(config, model.config, temperature=settings.temperature, kl=settings.kl)
    execution = devices.execution(config, model.params, loss.fields)
    roll_out = make_roll_out(config, model, rewarded)
    checked = min(config.data.validation_examples, len(rewarded.held_out))
    validation = _indices(checked, settings.prompts)
    evaluate = functools.partial(_lacking, roll_out, rewarded.held_out)
    sums = [evaluate({}, model.params, part) for part in validation]
    base_loss = setup.mean_loss(sums, loss.unit)
    log({"event": "base", "val_loss": base_loss})

    @functools.cache
    def by_loss(name: str) -> Shared:
        if name in ("", config.train.loss):
            return shared
        return _over(losses.learning_by(config, name), model, workdir, log, rewarded)

    task = Task(
        batches=functools.partial(_prompts, config, len(rewarded.train)),
        identity=functools.partial(_identity, config, rewarded),
        validation=validation,
        sweep=lambda arm: _sweep(config, model, arm, loss, execution, roll_out, rewarded),
        settings=lambda given: loss.settings_of(**given),
        held_out=lambda: [_conversation(example) for example in rewarded.held_out],
        base_loss=base_loss,
        unit=loss.unit,
    )
    shared = Shared(
        config=config, model=model, workdir=workdir, log=log, task=task, by_loss=by_loss
    )
    return shared


def _sweep(
    config: ConfigDict,
    model: Pretrained,
    arm: Arm,
    loss: Loss,
    execution: Execution,
    roll_out: RollOut,
    rewarded: Rewarded,
) -> Sweep:
    """Arms in turn: each samples its own answers."""
    settings = config.reinforce
    attention = None if config.model.attention == "auto" else config.model.attention
    read = target_log_probs(model.config, temperature=settings.temperature, attention=attention)
    policy = policy_step(
        step_of(config, arm, loss), roll_out, read, updates=settings.updates, execution=execution
    )
    stopped = StepMetrics(jnp.float32(jnp.nan), jnp.float32(jnp.nan), jnp.float32(0))

    def step(states, base, batch, running):
        moved, metrics = list(states), [stopped] * len(states)
        asked = [rewarded.train[i] for i in batch["example"]]
        for i in (i for i, runs in enumerate(running) if runs):
            moved[i], found, rollout = policy(states[i], base, asked)
            lacking, counted = _sum(rollout)
            metrics[i] = StepMetrics(
                jnp.float32(lacking / counted), found.grad_norm, jnp.float32(counted)
            )
        return moved, jax.tree.map(lambda *leaves: jnp.stack(leaves), *metrics)

    def evaluate(states, base, batch):
        sums = [_lacking(roll_out, rewarded.held_out, s.delta, base, batch) for s in states]
        return tuple(np.array(sums).T)

    return Sweep(
        pack=lambda states: [execution.states(state, False) for state in states],
        unpack=list,
        step=step,
        evaluate=evaluate,
    )


def _lacking(
    roll_out: RollOut, held_out: Sequence[Example], delta: Delta, base: PyTree, batch: Mapping
) -> tuple[float, float]:
    """The sum of `1 - reward` over answers to these prompts, and their number."""
    return _sum(roll_out(delta, base, [held_out[i] for i in batch["example"]], _key(batch)))


def _sum(rollout: Rollout) -> tuple[float, float]:
    return float(np.nansum(1 - rollout.rewards)), float((~np.isnan(rollout.rewards)).sum())


def _key(batch: Mapping[str, Any]) -> jax.Array:
    """The same for all arms and steps: what is compared had the same luck."""
    return jax.random.fold_in(jax.random.key(_HELD_OUT), int(batch["example"][0]))


def _indices(count: int, prompts: int) -> list[dict[str, np.ndarray]]:
    """All examples in batches of so many prompts; what does not fill one is left out."""
    kept = np.arange(count - count % prompts, dtype=np.int32).reshape(-1, prompts)
    return [{"example": part} for part in kept]


def _prompts(config: ConfigDict, count: int, data_seed: int) -> Any:
    """An endless iterator of prompts by number, every epoch in a new order."""
    order = grain.MapDataset.range(count).shuffle(seed=config.data.seed + data_seed).repeat()
    batches = order.batch(config.reinforce.prompts, drop_remainder=True)
    named = batches.map(lambda part: {"example": np.asarray(part, np.int32)})
    return iter(named.to_iter_dataset(_QUIET))


def _identity(config: ConfigDict, rewarded: Rewarded, data_seed: int) -> dict[str, Any]:
    text = [str(example) for example in (*rewarded.train, *rewarded.held_out)]
    return {
        "data.examples": digest({"text": np.frombuffer("\n".join(text).encode(), np.uint8)}),
        "data.seed": config.data.seed + data_seed,
        **{f"reinforce.{name}": value for name, value in _sampled(config).items()},
    }


def _sampled(config: ConfigDict) -> dict[str, Any]:
    names = ("prompts", "group", "new_tokens", "temperature", "updates", "kl")
    return {name: config.reinforce[name] for name in names}


def _conversation(example: Example) -> dict[str, Any]:
    answer = {"role": "assistant", "content": example["answer"]}
    return {"messages": [*example["prompt"], answer]}
