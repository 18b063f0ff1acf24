"""What the model says before and after."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import lora_jax as lora
from experiments.harness import setup
from experiments.harness.outcome import Outcome
from lora_jax import data, models
from lora_jax.interop import Pretrained
from lora_jax.models.generate import generate
from lora_jax.parallel import hosts


def sample(
    config: ConfigDict,
    model: Pretrained,
    best: Outcome | None,
    log: Callable[[dict[str, Any]], None],
) -> list[dict[str, str]]:
    """Greedy answers to the first validation prompts, by the base and by the best arm."""
    count = config.samples.prompts
    if best is None or not count:
        return []
    log({"event": "sampling", "arm": best.arm.name})
    held_out = setup.records(config, "validation")
    conversations = [held_out[i]["messages"] for i in range(min(count, len(held_out)))]
    prompts = [
        data.render_messages(messages[:-1], model.tokenizer, add_generation_prompt=True)
        for messages in conversations
    ]
    answers = _answering(config, model, prompts)
    before, after = answers(model.params), answers(lora.bind(model.params, best.delta))
    return [
        {
            "prompt": messages[-2]["content"],
            "reference": messages[-1]["content"],
            "base": plain,
            "adapted": adapted,
            "arm": best.arm.name,
        }
        for messages, plain, adapted in zip(conversations, before, after, strict=True)
    ]


def _answering(
    config: ConfigDict, model: Pretrained, prompts: list[str]
) -> Callable[[models.Params], list[str]]:
    """The function from params to the greedy answers to `prompts`."""
    tokenizer = model.tokenizer
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    width = max(map(len, encoded))
    rows = np.array([row + [tokenizer.eos_id] * (width - len(row)) for row in encoded], np.int32)
    lengths = np.array([len(row) for row in encoded], np.int32)

    @jax.jit
    def answer(params, rows, lengths):
        return generate(
            params,
            rows,
            lengths,
            model.config,
            max_new_tokens=config.samples.max_new_tokens,
            eos_id=tokenizer.eos_id,
        )

    def answers(params: models.Params) -> list[str]:
        tokens = hosts.gathered(answer(params, rows, lengths)).tolist()
        return [said(tokenizer, row) for row in tokens]

    return answers


def said(tokenizer: data.Tokenizer, tokens: list[int]) -> str:
    """The text of an answer; -1 among its tokens stands for logits that are no numbers."""
    if -1 in tokens:
        return "(its logits are not numbers)"
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()
