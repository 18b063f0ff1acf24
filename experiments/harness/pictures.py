"""Pictures of results, drawn with matplotlib."""

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from lora_jax.training import records

INK, GRID = "#22262e", "#d9dce3"
STYLE: Any = {
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def loss_by_rank(path: Path, results: dict[str, Any]) -> None:
    """Validation loss by rank with the spread over seeds, beside the training curves."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        by_rate: dict[float, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for arm in _finished(results):
            if arm["rank"] is not None:
                by_rate[arm["learning_rate"]][arm["rank"]].append(arm["val_loss"])
        for number, (rate, by_rank) in enumerate(sorted(by_rate.items())):
            _spread(left, sorted(by_rank), [by_rank[r] for r in sorted(by_rank)], number, rate)
        for arm in _finished(results):
            if arm["rank"] is None:
                left.axhline(arm["val_loss"], color="C7", linestyle=":", label="full fine-tuning")
        ranks = sorted({rank for by_rank in by_rate.values() for rank in by_rank})
        left.set_xscale("log", base=2)
        left.set_xticks(ranks, [str(rank) for rank in ranks])
        left.minorticks_off()
        left.set(xlabel="rank", ylabel="validation loss (nats a token)")
        _base_line(left, results)
        _legend(left)
        _curves(right, path.parent / "metrics.jsonl", results)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def loss_by_step(path: Path, results: dict[str, Any]) -> None:
    """Training loss by step, validation loss where it was taken, and the untuned base's."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        metrics = path.parent / "metrics.jsonl"
        _curves(axes, metrics, results)
        points = [(r["step"], r["val_loss"]) for r in records.read(metrics) if "val_loss" in r]
        axes.plot(*zip(*points, strict=True), color="C1", marker="o", label="validation")
        _base_line(axes, results)
        axes.set(ylabel="loss (nats a token)")
        _legend(axes)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def loss_by_targets(path: Path, results: dict[str, Any]) -> None:
    """Validation loss by target set, at equal rank and at equal parameters."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        arms = _finished(results)
        groups = ("equal rank", "equal parameters")
        targets = list(dict.fromkeys(arm["targets"] for arm in arms))
        for number, group in enumerate(groups):
            for place, target in enumerate(targets):
                losses = [
                    arm["val_loss"]
                    for arm in arms
                    if arm["targets"] == target
                    and arm["group"] in (group, "equal rank and parameters")
                ]
                if not losses:
                    continue
                x = place + (number - (len(groups) - 1) / 2) * 0.3
                label = group if place == 0 else None
                left.scatter([x] * len(losses), losses, color=f"C{number}", s=22, label=label)
                left.hlines(statistics.mean(losses), x - 0.11, x + 0.11, color=f"C{number}")
        left.set_xticks(range(len(targets)), targets)
        left.set(ylabel="validation loss (nats a token)")
        _base_line(left, results)
        _legend(left)
        _curves(right, path.parent / "metrics.jsonl", results)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def loss_by_format(path: Path, results: dict[str, Any]) -> None:
    """What a format adds to the validation loss, beside its error on normal weights."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained", sharey=True)
        exact, *rows = results["formats"]
        names = [f"{row['format']}  ({row['bits']:.2f} bits)" for row in rows]
        added = [row["val_loss"] - exact["val_loss"] for row in rows]
        errors = [100 * row["normal_error"] for row in rows]
        for axis, values, label in (
            (axes[0], added, f"added validation loss (nats a token, over {exact['val_loss']:.3f})"),
            (axes[1], errors, "error on normal weights (%, root mean square)"),
        ):
            bars = axis.barh(names, values, color="C0", height=0.55)
            axis.bar_label(bars, fmt="%.3f" if axis is axes[0] else "%.2f", padding=3)
            axis.set(xlabel=label, axisbelow=True)
            axis.margins(x=0.18)
        axes[0].invert_yaxis()
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _base_line(axes, results: dict[str, Any]) -> None:
    """The untuned base, so that differences between arms are seen at their true size."""
    loss = results["base"]["val_loss"]
    axes.axhline(loss, color=INK, linestyle="--", linewidth=1, label=f"untuned base, {loss:.3f}")
    axes.margins(y=0.12)


def _spread(axes, xs: list[int], groups: list[list[float]], number: int, rate: float) -> None:
    color = f"C{number}"
    means = [statistics.mean(group) for group in groups]
    axes.plot(xs, means, marker="o", color=color, label=f"learning rate {rate:g}")
    for x, mean in zip(xs, means, strict=True):
        axes.annotate(
            f"{mean:.3f}", (x, mean), xytext=(0, 7), textcoords="offset points", ha="center"
        )
    if any(len(group) > 1 for group in groups):
        lows, highs = [min(group) for group in groups], [max(group) for group in groups]
        axes.fill_between(xs, lows, highs, color=color, alpha=0.18, linewidth=0)


def _curves(axes, metrics: Path, results: dict[str, Any]) -> None:
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for record in records.read(metrics):
        if "loss" in record:
            points[record["arm"]].append((record["step"], record["loss"]))
    names = [arm["name"] for arm in results["arms"] if arm["name"] in points]
    shades = plt.colormaps["viridis"]
    for number, name in enumerate(names):
        color = shades(0.9 * number / max(len(names) - 1, 1))
        axes.plot(*zip(*points[name], strict=True), color=color, linewidth=1.3, label=name)
    axes.set(xlabel="step", ylabel="training loss (nats a token)")
    _legend(axes)


def _legend(axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        axes.legend(unique.values(), unique.keys(), fontsize=8)


def _finished(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [arm for arm in results["arms"] if arm["val_loss"] is not None]
