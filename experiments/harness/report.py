"""Results as JSON, as a table for people, and the machine that made them."""

import datetime
import importlib.metadata
import math
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.harness.progress import console
from lora_jax.tables import aligned
from lora_jax.training import records

HEADER = ("arm", "rank", "targets", "trainable", "%", "train", "val", "perplexity", "tokens/s")
Table = tuple[Sequence[str], list[tuple[str, ...]], list[str]]  # header, cells, notes


def environment() -> dict[str, Any]:
    """Versions, hardware and commit."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "commit": commit or None,
        "cpu_seconds": round(time.process_time()),
    }


def write(workdir: Path, title: str, command: str, results: Mapping[str, Any]) -> None:
    """Writes `results.json` and `results.md`, and prints the table."""
    results = {"title": title, "command": command, **results, "environment": environment()}
    records.write_json(workdir / "results.json", results)
    header, cells, notes = by_arm(results)
    text = markdown(title, command, results, [*table(header, cells), "", *notes])
    (workdir / "results.md").write_text(text)
    console.print(f"\n[bold]{title}[/bold]")
    console.print(aligned([header, *cells], left=3), markup=False)
    for sample in results["samples"]:
        console.print(f"\n{sample['prompt']}", markup=False, style="bold")
        for name in ("reference", "base", "adapted"):
            console.print(f"  {name:>9}: {_one_line(sample[name])}", markup=False)


def by_arm(results: Mapping[str, Any]) -> Table:
    """An arm a row, the untuned base first."""
    base, names = results["base"], _measured(results)
    unit = base.get("unit", "token")
    perplexity = math.exp(base["val_loss"]) if unit == "token" else None
    # Of losses of several, each has its own value of the untuned base.
    losses = ("", "") if names else (_number(base["val_loss"]), _number(perplexity, 2))
    cells: list[tuple[str, ...]] = [
        (f"{base['name']}, untuned", "", "", "0", "", "", *losses, "", *_numbers(base, names))
    ]
    for arm in results["arms"]:
        cells.append(
            (
                arm["name"],
                "" if arm["rank"] is None else str(arm["rank"]),
                arm["targets"],
                f"{arm['trainable_params']:,}",
                f"{arm['trainable_percent']:.3f}",
                _number(arm["train_loss"]),
                _number(arm["val_loss"]),
                _number(arm["perplexity"], 2),
                _number(arm["tokens_per_second"], 0),
                *_numbers(arm, names),
            )
        )
    note = "Losses are nats a response token; train is the mean of the last ten steps."
    if names:
        note = "Losses are each arm's own; train is the mean of the last ten steps."
    return (*HEADER, *names), cells, [note]


def markdown(title: str, command: str, results: Mapping[str, Any], body: Sequence[str]) -> str:
    """`results.md`: the table, the samples, the command and the machine."""
    lines = [f"# {title}", "", f"`{command}`", "", *body]
    for sample in results["samples"]:
        lines += ["", f"**{_one_line(sample['prompt'])}**", ""]
        lines += [f"- {name}: {_one_line(sample[name])}" for name in ("reference", "base")]
        lines += [f"- {sample['arm']}: {_one_line(sample['adapted'])}"]
    return "\n".join([*lines, "", machine(results), ""])


def table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, *cells)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def machine(results: Mapping[str, Any]) -> str:
    """When, for how long, on what and with which versions."""
    found = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"{found['date']}, {results['seconds']:.0f} s ({found['cpu_seconds']} s of CPU time) on "
        f"{found['device']} ({found['cpus']} CPU cores), Python {found['python']}, {versions}, "
        f"commit {found['commit']}."
    )


def _measured(results: Mapping[str, Any]) -> list[str]:
    """The names of what was measured beside the loss."""
    return list(results["base"].get("measured") or ())


def _numbers(found: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [_number((found["measured"] or {}).get(name), 3) for name in names]


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
