"""Answers sampled from the current policy, with their rewards, as a batch of `grpo_loss`."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.data.encode import render_messages
from lora_jax.data.tokenizer import Tokenizer
from lora_jax.models import DecoderConfig
from lora_jax.models.generate import NONE, sample
from lora_jax.training.policy import group_advantages
from lora_jax.training.rewards import Example, OnError, Reward, scored
from lora_jax.transform import Delta, bind
from lora_jax.weights import PyTree

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are sampled.

    Attributes:
      group: answers to each prompt, at least 2.
      prompt_tokens: of a prompt at most; rows have a fixed length.
      new_tokens: of an answer at most.
      temperature: of the distribution that is sampled; also `grpo_loss`'s.
      scale: whether advantages are divided by their group's deviation: GRPO, not Dr. GRPO.
      on_error: what a failing reward does; see `scored`.
    """

    group: int
    prompt_tokens: int
    new_tokens: int
    temperature: float = 1.0
    scale: bool = True
    on_error: OnError = "stop"

    def __post_init__(self) -> None:
        least = {"group": 2, "prompt_tokens": 1, "new_tokens": 1}
        for name, count in least.items():
            if getattr(self, name) < count:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {count}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """Answers to P prompts, G to each, those of a prompt one after another.

    Attributes:
      batch: what `grpo_loss` takes, `[P * G, prompt_tokens + new_tokens]`.
      rewards: `[P, G]`, NaN where the reward failed.
      prompts, completions: texts, `P * G` each; special tokens are left out of completions.
      lengths: `[P, G]`, tokens of each answer, the end of the turn included.
    """

    batch: Mapping[str, np.ndarray]
    rewards: np.ndarray
    prompts: Sequence[str]
    completions: Sequence[str]
    lengths: np.ndarray


RollOut = Callable[[Delta, PyTree, Sequence[Example], jax.Array], Rollout]


def make_rollout(
    config: DecoderConfig, tokenizer: Tokenizer, reward: Reward, sampling: Sampling
) -> RollOut:
    """The function `(delta, base, examples, key) -> Rollout`, which compiles once.

    An example has `prompt`, text or messages, or `messages`, of which the last answer is left out;
    all of it goes to the reward.

    Raises:
      ValueError: for prompts and answers that exceed the model's context. The function raises it
        for a prompt of more than `prompt_tokens`, naming the example (see `fitting_prompts`), for
        logits that are no numbers, and as `scored`.
    """
    width = sampling.prompt_tokens + sampling.new_tokens
    if width > config.context_length:
        raise ValueError(
            f"prompts of {sampling.prompt_tokens} tokens and answers of {sampling.new_tokens} "
            f"exceed the model's context of {config.context_length}."
        )

    @jax.jit
    def sampled(delta, base, prompts, lengths, key):
        return sample(
            bind(base, delta),
            prompts,
            lengths,
            config,
            max_new_tokens=sampling.new_tokens,
            eos_id=tokenizer.eos_id,
            key=key,
            temperature=sampling.temperature,
        )

    def roll_out(delta, base, examples, key):
        texts = [prompt_text(example, tokenizer) for example in examples]
        ids = [tokenizer.encode(text) for text in texts]
        for index, tokens in enumerate(ids):
            _require_short(index, texts[index], len(tokens), sampling)
        each = [i for i in range(len(examples)) for _ in range(sampling.group)]
        prompts = np.zeros((len(each), sampling.prompt_tokens), np.int32)
        counts = np.array([len(ids[i]) for i in each], np.int32)
        for row, i in enumerate(each):
            prompts[row, : len(ids[i])] = ids[i]
        tokens, log_probs = map(
            np.asarray, sampled(delta, base, jnp.asarray(prompts), jnp.asarray(counts), key)
        )
        lengths = _lengths(tokens, tokenizer.eos_id)
        completions = [
            tokenizer.decode(row[:n].tolist(), skip_special_tokens=True)
            for row, n in zip(tokens, lengths, strict=True)
        ]
        prompts_of = [texts[i] for i in each]
        examples_of = [examples[i] for i in each]
        rewards = scored(
            reward, prompts_of, completions, examples_of, on_error=sampling.on_error
        ).reshape(-1, sampling.group)
        advantages = np.asarray(group_advantages(rewards, scale=sampling.scale)).reshape(-1)
        batch = _batch(prompts, counts, tokens, lengths, log_probs)
        batch["advantages"] = np.where(batch["loss_mask"], advantages[:, None], 0.0)
        batch["loss_mask"] &= ~np.isnan(rewards).reshape(-1, 1)
        return Rollout(
            batch=batch,
            rewards=rewards,
            prompts=prompts_of,
            completions=completions,
            lengths=lengths.reshape(-1, sampling.group),
        )

    return roll_out


def fitting_prompts(
    examples: Sequence[Example], tokenizer: Tokenizer, sampling: Sampling
) -> tuple[list[Example], int]:
    """The examples whose prompts fit, and how many do not, which is logged.

    Raises:
      ValueError: none fits.
    """
    lengths = [len(tokenizer.encode(prompt_text(example, tokenizer))) for example in examples]
    kept = [
        example
        for example, length in zip(examples, lengths, strict=True)
        if length <= sampling.prompt_tokens
    ]
    if not kept:
        shortest = f"the shortest takes {min(lengths)}" if lengths else "there is none"
        raise ValueError(f"No prompt fits {sampling.prompt_tokens} tokens: {shortest}.")
    if skipped := len(examples) - len(kept):
        limit = sampling.prompt_tokens
        _logger.warning("Skipped %d prompts of more than %d tokens.", skipped, limit)
    return kept, len(examples) - len(kept)


def prompt_text(example: Example, tokenizer: Tokenizer) -> str:
    """The text that the model reads before it answers."""
    prompt = example.get("prompt", example.get("messages"))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    elif prompt is None:
        raise ValueError(f"the example holds {', '.join(example)}: expected prompt or messages.")
    elif "prompt" not in example and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    return render_messages(prompt, tokenizer, add_generation_prompt=True)


def _require_short(index: int, text: str, length: int, sampling: Sampling) -> None:
    if length > sampling.prompt_tokens:
        raise ValueError(
            f"the prompt of example {index}, which begins {text[:40]!r}, takes {length} tokens, "
            f"more than prompt_tokens={sampling.prompt_tokens}: raise it, or leave such examples "
            "out, by fitting_prompts."
        )


def _lengths(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """How many tokens of each row are its answer, the first `eos_id` included."""
    if (tokens == NONE).any():
        row = int(np.argmax((tokens == NONE).any(1)))
        raise ValueError(
            f"the model's logits are not numbers in answer {row}: the policy has diverged. Lower "
            "the learning rate."
        )
    ends = tokens == eos_id
    return np.where(ends.any(1), ends.argmax(1) + 1, tokens.shape[1])


def _batch(prompts, counts, tokens, lengths, log_probs) -> dict[str, Any]:
    """Rows of a prompt and its answer, as `next_token_loss` has them, each target's probability."""
    rows, width = len(tokens), prompts.shape[1] + tokens.shape[1]
    at = np.arange(width, dtype=np.int32)
    whole = np.zeros((rows, width + 1), np.int32)
    sampler = np.zeros((rows, width), np.float32)
    for row, (before, n) in enumerate(zip(counts, lengths, strict=True)):
        whole[row, :before] = prompts[row, :before]
        whole[row, before : before + n] = tokens[row, :n]
        sampler[row, before - 1 : before - 1 + n] = log_probs[row, :n]
    last = counts[:, None] + lengths[:, None] - 1
    filled = at < last
    return {
        "tokens": np.where(filled, whole[:, :-1], 0),
        "targets": np.where(filled, whole[:, 1:], 0),
        "loss_mask": filled & (at >= counts[:, None] - 1),
        "segment_ids": filled.astype(np.int32),
        "positions": np.where(filled, at, 0),
        "sampler_log_probs": sampler,
    }
