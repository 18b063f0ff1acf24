"""What a person sees while a sweep runs, and what `metrics.jsonl` keeps of it."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_jax.parallel import hosts
from lora_jax.training import records

SECONDS_BETWEEN_LINES = 10
console = Console(highlight=False, soft_wrap=True)


@contextlib.contextmanager
def reporting(metrics: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields what a run logs to: it shows each record, and keeps those that are metrics."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]} tokens/s"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    started = time.perf_counter()
    losses: dict[str, float] = {}
    rates: dict[str, float] = {}
    task = bar.add_task("training", visible=False, tokens="")
    first = said = (0, started)  # a step and its time: the run's first, the last one in a line

    def say(text: str) -> None:
        console.print(f"[dim]{time.perf_counter() - started:6.1f} s[/dim]  {text}")

    def say_step(record: dict[str, Any], total: float) -> None:
        """A line every few seconds, where no bar is drawn: in a pipe or a log file."""
        nonlocal said
        step, now = record["step"], time.perf_counter()
        if console.is_terminal or step == said[0] or now - said[1] < SECONDS_BETWEEN_LINES:
            return
        said = (step, now)
        left = (total - step) * (now - first[1]) / max(1, step - first[0])
        arm, loss = record["arm"], record["loss"]
        say(f"step {step} of {total:.0f}: {arm} loss {loss:.4f}, {left:.0f} s left")

    def show(record: dict[str, Any]) -> None:
        nonlocal first, said
        event = record.get("event")
        if event == "started":
            first = said = (record["step"], time.perf_counter())
            records.rewind(metrics, record["arms"], record["step"])
            losses.clear()
            rates.clear()
            if record["step"]:
                say(f"continuing after step {record['step']} of {record['steps']}")
            bar.update(task, total=record["steps"], completed=record["step"], visible=True)
        elif event is not None:
            say(_sentence(record))
        elif "val_loss" in record:
            say(f"step {record['step']}: {record['arm']} validation loss {record['val_loss']:.4f}")
        else:
            losses[record["arm"]] = record["loss"]
            rates[record["arm"]] = record.get("tokens_per_second", 0.0)
            mean_rate = sum(rates.values()) / len(rates)
            low, high = min(losses.values()), max(losses.values())
            bar.update(
                task,
                description=f"loss {low:.3f} to {high:.3f}" if high > low else f"loss {low:.3f}",
                completed=record["step"],
                tokens=f"{mean_rate:.0f}",
            )
            say_step(record, bar.tasks[task].total or 0)
        if event is None:
            records.append(metrics, record)

    with bar:
        yield show if hosts.is_first() else lambda record: None


def _sentence(record: dict[str, Any]) -> str:
    event, arm = record["event"], record.get("arm", "")
    sentences = {
        "loading": f"loading {record.get('what')}",
        "compiling": f"compiling one step for {counted(len(record.get('arms', ())))}",
        "base": f"the untuned base: validation loss {record.get('val_loss', 0):.4f}",
        "diverged": f"[red]{arm} diverged at step {record.get('step')}: its loss is not a number. "
        "It stops here; lower its learning rate, or warm up for longer.[/red]",
        "given up": f"{arm} is given up at step {record.get('step')}: its cell's best is ahead",
        "stopped early": f"{arm} stops at step {record.get('step')}: validation improves no more",
        "no adapter": f"[red]no adapter folder for {arm}: {escape(record.get('why', ''))}[/red]",
        "verified": _verified(record),
        "unverified": f"[red]the adapter of {arm} fails: {escape(record.get('why', ''))}[/red]",
        "measuring": f"measuring {record.get('what')}",
        "sampling": f"sampling from the base and from {arm}",
    }
    return sentences[event]


def counted(count: int) -> str:
    """So many arms, in words."""
    return "1 arm" if count == 1 else f"{count} arms"


def _verified(record: dict[str, Any]) -> str:
    findings = "".join(f"\n          {escape(text)}" for text in record.get("findings", ()))
    return f"the adapter of {record.get('arm', '')}: {escape(record.get('what', ''))}{findings}"
