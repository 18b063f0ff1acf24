"""What the model says before and after."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import lora_jax as lora
from experiments.harness.encoding import conversation
from experiments.harness.outcome import Outcome
from lora_jax import data, models
from lora_jax.interop import Pretrained
from lora_jax.models.generate import generate
from lora_jax.parallel import hosts


def sample(
    config: ConfigDict,
    model: Pretrained,
    best: Outcome | None,
    held_out: Callable[[], Sequence[data.Record]],
    log: Callable[[dict[str, Any]], None],
) -> list[dict[str, str]]:
    """Greedy answers to the first validation prompts, by the base and by the best arm."""
    count = config.samples.prompts
    if best is None or not count:
        return []
    log({"event": "sampling", "arm": best.arm.name})
    room = model.config.context_length - config.samples.max_new_tokens
    asked = _asked(held_out(), model, count, room)
    if not asked:
        return []
    weights = lora.bind(model.params, best.delta)
    answers = answering(config, model, [rendered for _, rendered in asked])
    before, after = answers(model.params), answers(weights)
    return [
        {
            "prompt": messages[-2]["content"] if len(messages) > 1 else "",
            "reference": messages[-1]["content"],
            "base": plain,
            "adapted": adapted,
            "arm": best.arm.name,
        }
        for (messages, _), plain, adapted in zip(asked, before, after, strict=True)
    ]


def _asked(
    held_out: Sequence[data.Record], model: Pretrained, count: int, room: int
) -> list[tuple[list[dict[str, Any]], str]]:
    """The first conversations up to their last answer, with the text before it, where that leaves
    room for an answer."""
    found = []
    for record in held_out:
        messages = conversation(record)
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        rendered = data.render_messages(
            messages[:last], model.tokenizer, add_generation_prompt=True
        )
        if len(model.tokenizer.encode(rendered)) <= room:
            found.append((messages[: last + 1], rendered))
        if len(found) == count:
            break
    return found


def answering(
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
