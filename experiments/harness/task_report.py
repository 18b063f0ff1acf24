"""A fine-tuning task in words before it starts, and the commands that follow it."""

import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness.task import Task
from lora_jax.data import EncodedSource

ROOT = Path(__file__).parents[2]


def in_words(task: Task) -> str:
    """What kind of task it is."""
    rows = [
        ("model", _model(task)),
        ("data", _data(task)),
        ("lengths", _lengths(task)),
        ("tokens", _tokens(task.examples.train)),
        ("a step", _step(task)),
        ("training", _training(task)),
        ("validation", _validation(task)),
    ]
    return "\n".join(f"  {name:<12}{text}" for name, text in rows)


def _model(task: Task) -> str:
    settings, counts = task.config.lora, task.counts
    return (
        f"{task.model.name} in {task.config.model.dtype}; LoRA r {settings.rank}, alpha "
        f"{settings.method.alpha:g}, dropout {settings.method.dropout:g} on {settings.targets}: "
        f"{counts.trainable_params:,} trained parameters, {counts.trainable_percent:.2f} %"
    )


def _data(task: Task) -> str:
    settings, examples = task.config.data, task.examples
    found = len(examples.train.examples), len(examples.validation.examples)
    text = (
        f"{settings.path or settings.source}: {found[0]:,} examples to train on, {found[1]:,} to "
        "validate on"
    )
    skipped = examples.train.skipped, examples.validation.skipped
    if any(skipped):
        longest, context = max(task.lengths), task.model.config.context_length
        text += (
            f"; {skipped[0]:,} and {skipped[1]:,} skipped as longer than seq_len "
            f"({settings.seq_len:,}): "
        )
        if longest > context:
            text += f"the model's context is {context:,}, so cut longer chats into several"
        else:
            text += f"--config.data.seq_len={longest} takes all that are trained on"
    return text


def _lengths(task: Task) -> str:
    median, most = np.quantile(task.lengths, (0.5, 0.95), method="higher")
    return (
        f"median {median:,} tokens, 95 % up to {most:,}, the longest {max(task.lengths):,}; rows "
        f"of {task.config.data.seq_len:,}"
    )


def _totals(source: EncodedSource) -> tuple[int, int]:
    """Tokens, and those of them that count."""
    return (
        sum(len(example["tokens"]) for example in source.examples),
        sum(int(example["loss_mask"].sum()) for example in source.examples),
    )


def _tokens(train: EncodedSource) -> str:
    total, counted = _totals(train)
    return (
        f"{total:,} an epoch; {counted:,} count ({counted / total:.0%}), those that the assistant "
        "wrote"
    )


def _step(task: Task) -> str:
    settings, train = task.config.data, task.examples.train
    share = task.epochs / task.config.train.steps  # of an epoch
    total, counted = _totals(train)
    rows = f"{settings.batch_size} row{'s' if settings.batch_size > 1 else ''}"
    return (
        f"{rows} with about {share * len(train.examples):.1f} examples, {share * total:,.0f} "
        f"tokens, {share * counted:,.0f} that count"
    )


def _training(task: Task) -> str:
    settings, warm_up = task.config.train, task.config.train.warmup_steps
    rate = f"learning rate {settings.learning_rate:g}, "
    if warm_up:
        rate += f"{warm_up} step{'s' if warm_up > 1 else ''} of warm-up, then "
    return f"{task.epochs:.3g} epochs are {settings.steps:,} steps; {rate}{settings.schedule}"


def _validation(task: Task) -> str:
    settings = task.config.train
    text = f"every {settings.eval_every} steps" if settings.eval_every > 1 else "every step"
    if not settings.patience:
        return f"{text}; the last state is kept"
    return f"{text}; ends after {settings.patience} without a new best, which is kept"


def next_commands(task: Task, workdir: Path, results: dict[str, Any]) -> str:
    """What to do with the adapter: as commands of this working directory."""
    source = task.config.model.source
    if source == "random":
        return "The base is random weights, which nothing else can load: there is no next command."
    adapters = workdir / "adapters"
    adapter, base = str(adapters / task.arm.folder), _flags(task)
    named = "" if task.model.name == source else f" {_flag('base', source)}"
    merged = str(workdir / "merged")
    prompt = shlex.quote(_prompt(results))
    port = "--port=8000"
    lines = [
        f"{_script('generate')} {_flag('adapter', adapter)}{named}{base} {prompt}",
        f"{_script('generate')} {_flag('adapter', adapter)}{named}{base} --chat",
        f"{_script('serve')} {_flag('adapters', str(adapters))} {_flag('model', source)}{base} "
        f"{port}",
        f"{_script('verify')} {shlex.quote(adapter)} {_flag('base', source)}{base}",
        f"{_script('convert')} {_flag('from', source)} {_flag('adapter', adapter)} --merge "
        f"{_flag('to', merged)}",
    ]
    told = f"The adapter is {adapter}. Ask it, talk with it, serve it, check it, merge it:"
    return "\n".join([told, "", *(f"  {line}" for line in lines)])


def _flags(task: Task) -> str:
    """How the base is to be loaded, where that is not the scripts' default."""
    dtype, format = task.config.model.dtype, task.config.base.quantize
    text = "" if dtype == "float32" else f" --dtype={dtype}"
    return text if format == "none" else f"{text} --quantize={format}"


def _flag(name: str, value: str) -> str:
    return shlex.quote(f"--{name}={value}")


def _script(name: str) -> str:
    path = ROOT / "scripts" / f"{name}.py"
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"python {shlex.quote(os.fspath(shown))}"


def _prompt(results: dict[str, Any]) -> str:
    """A validation prompt that fits into a line of a shell."""
    prompts = [sample["prompt"] for sample in results["samples"]]
    short = [prompt for prompt in prompts if prompt.strip() and len(prompt.splitlines()) == 1]
    return next((prompt for prompt in short if len(prompt) <= 120), "Who are you?")
