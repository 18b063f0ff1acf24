"""Pictures of studies, drawn with matplotlib: seeds as points, 95 % intervals as bars."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.harness.pictures import INK, STYLE, plt

Cell = Mapping[str, Any]


def loss_by_rank(path: Path, results: dict[str, Any]) -> None:
    """Validation loss by rank at the best rates, beside the loss by learning rate of each rank."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        ranked = sorted(
            (cell for cell in results["cells"] if cell["rank"]), key=lambda cell: cell["rank"]
        )
        full = [cell for cell in results["cells"] if not cell["rank"]]
        places = [math.log2(cell["rank"]) for cell in ranked]
        for place, cell in zip(places, ranked, strict=True):
            _spread(left, place, cell, "C0")
        left.plot(places, [_middle(cell) for cell in ranked], color="C0", linewidth=1)
        for cell in full:
            place = max(places, default=0) + 1.5
            _spread(left, place, cell, "C1")
            places, ranked = [*places, place], [*ranked, cell]
        left.set_xticks(places, [str(cell["rank"] or "full") for cell in ranked])
        left.minorticks_off()
        left.set(xlabel="rank", ylabel="validation loss (nats a token)")
        _by_rate(right, results, [*ranked], lambda cell: str(cell["rank"] or "full"))
        figure.savefig(path, dpi=150)
        plt.close(figure)


def loss_by_targets(path: Path, results: dict[str, Any]) -> None:
    """Validation loss by targets, at equal rank and at equal parameters, beside learning rates."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        targets = list(dict.fromkeys(cell["targets"] for cell in results["cells"]))
        groups = ("equal rank", "equal parameters")
        for cell in results["cells"]:
            for number, group in enumerate(groups):
                if group.split()[1] in cell["group"]:
                    place = targets.index(cell["targets"]) + (number - 0.5) * 0.36
                    _spread(left, place, cell, f"C{number}", label=f"r {cell['rank']}")
        for number, group in enumerate(groups):
            left.scatter([], [], color=f"C{number}", label=group)
        left.legend(fontsize=8)
        left.set_xticks(range(len(targets)), targets)
        left.set(ylabel="validation loss (nats a token)")
        left.margins(x=0.12)
        _by_rate(right, results, results["cells"], lambda cell: cell["cell"])
        figure.savefig(path, dpi=150)
        plt.close(figure)


def loss_by_rate(path: Path, results: dict[str, Any]) -> None:
    """The losses of each search by learning rate, a panel for each group of cells."""
    groups = list(dict.fromkeys(cell["group"] for cell in results["cells"]))
    with plt.rc_context(STYLE):
        size = (1.5 + 2.6 * len(groups), 4.2)
        figure, axes = plt.subplots(1, len(groups), figsize=size, layout="constrained",
                                    sharey=True, squeeze=False)  # fmt: skip
        for axis, group in zip(axes[0], groups, strict=True):
            cells = [cell for cell in results["cells"] if cell["group"] == group]
            _by_rate(axis, results, cells, lambda cell: cell["cell"].split(",")[0])
            axis.set_title(group, fontsize=10)
            axis.set_ylabel("")
        axes[0, 0].set_ylabel("validation loss, first seed")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def loss_by_method(path: Path, results: dict[str, Any]) -> None:
    """Each method's validation losses over seeds, at its best rate and where asked for at one rate
    for all, beside what it forgets and what a step of it costs."""
    tuned = [cell for cell in results["cells"] if cell["group"] == "tuned"]
    fixed = {cell["cell"].split(" at ")[0]: cell for cell in results["cells"] if cell not in tuned}
    panels = [("mean", 1.0, "validation loss (nats a token)")]
    panels += [
        (key, unit, label)
        for key, unit, label in (
            ("forgotten", 1.0, "nats forgotten on another text"),
            ("flops", 1e9, "GFLOP a step"),
            ("peak_bytes", 1e6, "MB a step"),
        )
        if any(cell.get(key) for cell in tuned)
    ]
    with plt.rc_context(STYLE):
        size = (5 + 2.4 * len(panels), 1.4 + 0.3 * len(tuned))
        figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained",
                                    sharey=True, squeeze=False)  # fmt: skip
        loss, *others = axes[0]
        for place, cell in enumerate(tuned):
            _spread(loss, place, cell, "C0", across=True)
            if cell["cell"] in fixed:
                _spread(loss, place + 0.3, fixed[cell["cell"]], "C1", across=True)
        names = [f"{cell['cell']}  ({cell['trainable_params'] / 1e6:.2f} M)" for cell in tuned]
        loss.set_yticks(range(len(tuned)), names)
        loss.invert_yaxis()
        loss.set(xlabel=panels[0][2])
        if fixed:
            loss.scatter([], [], color="C0", label="at its best rate")
            loss.scatter([], [], color="C1", label="at one rate for all")
            loss.legend(fontsize=8)
        for axis, (key, unit, label) in zip(others, panels[1:], strict=True):
            for place, cell in enumerate(tuned):
                found = cell.get(key)
                values = found if isinstance(found, list) else [found] * (found is not None)
                axis.scatter([v / unit for v in values], [place] * len(values), color="C0", s=18)
            axis.set(xlabel=label)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _spread(
    axes, place: float, cell: Cell, color: str, *, label: str = "", across: bool = False
) -> None:
    """Seeds as points beside their mean and its interval; `across` draws them from left to
    right."""
    losses = [value for value in cell.get("values", cell["losses"]).values() if value is not None]
    lines = axes.hlines if across else axes.vlines

    def scatter(values: Sequence[float], **how: Any) -> None:
        pair = ([place] * len(values), values)
        axes.scatter(*(pair[::-1] if across else pair), **how)

    if cell["interval"]:
        lines(place, *cell["interval"], color=color, linewidth=5, alpha=0.25)
    scatter(losses, color=color, s=12)
    if cell["mean"] is not None:
        scatter([cell["mean"]], color=INK, marker="|" if across else "_", s=90)
    if label and losses:
        axes.annotate(label, (place, max(losses)), xytext=(0, 6), textcoords="offset points",
                      ha="center", fontsize=8)  # fmt: skip


def _by_rate(axes, results: dict[str, Any], cells: Sequence[Cell], name) -> None:
    """Each cell's losses over the rates of its search, its name at the best."""
    shades = plt.colormaps["viridis"]
    for number, cell in enumerate(cells):
        color = shades(0.9 * number / max(len(cells) - 1, 1))
        searched = {
            row["learning_rate"]: row["val_loss"]
            for row in sorted(results["arms"], key=lambda row: row["learning_rate"])
            if row["cell"] == cell["cell"] and row["seed"] == 0 and not row["stopped"]
        }
        axes.plot(searched.keys(), searched.values(), color=color, linewidth=1.2, marker=".")
        best = cell["learning_rate"]
        if best in searched:
            axes.scatter(best, searched[best], color=color, s=40, zorder=3)
            axes.annotate(name(cell), (best, searched[best]), xytext=(3, -11),
                          textcoords="offset points", fontsize=8, color=color)  # fmt: skip
    axes.set_xscale("log", base=2)
    rates = sorted({row["learning_rate"] for row in results["arms"]})
    axes.set_xticks(rates, [f"{rate:.2g}" for rate in rates], rotation=60, fontsize=8)
    axes.minorticks_off()
    axes.set(xlabel="learning rate (best marked)", ylabel="validation loss, first seed")


def _middle(cell: Cell) -> float:
    return math.nan if cell["mean"] is None else cell["mean"]
