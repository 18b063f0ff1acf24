"""Pictures of what is measured beside the loss: a panel for each number, arms or cells as rows."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.harness.pictures import INK, STYLE, plt

Panels = Mapping[str, Sequence[Sequence[float]]]  # of each name, the values of each row


def by_arm(path: Path, results: dict[str, Any]) -> None:
    """Each arm's numbers, and the untuned base's as lines."""
    arms = [arm for arm in results["arms"] if arm["measured"]]
    base = results["base"]["measured"]
    panels = {name: [[arm["measured"][name]] for arm in arms] for name in base}
    _draw(path, [arm["name"] for arm in arms], panels, base)


def by_cell(path: Path, results: dict[str, Any]) -> None:
    """Each cell's numbers over seeds at its best rate, the means as strokes; the 95 % interval of
    what cells are compared by as a bar."""
    cells = [cell for cell in results["cells"] if cell["measured"]]
    names = list(dict.fromkeys(name for cell in cells for name in cell["measured"]))
    panels = {name: [cell["measured"][name] for cell in cells] for name in names}
    forgotten = [cell["forgotten"] for cell in cells]
    if all(forgotten) and forgotten:
        panels["nats forgotten on another text"] = forgotten
    base = (results["base"] or {}).get("measured") or {}
    intervals = {results["compared"]["by"]: [cell["interval"] for cell in cells]}
    _draw(path, [cell["cell"] for cell in cells], panels, base, intervals)


def _draw(
    path: Path,
    rows: Sequence[str],
    panels: Panels,
    base: Mapping[str, float],
    intervals: Mapping[str, Sequence[Sequence[float] | None]] | None = None,
) -> None:
    with plt.rc_context(STYLE):
        size = (2.5 + 2.5 * max(len(panels), 1), 1.4 + 0.35 * len(rows))
        figure, axes = plt.subplots(1, max(len(panels), 1), figsize=size, layout="constrained",
                                    sharey=True, squeeze=False)  # fmt: skip
        for axis, (name, values) in zip(axes[0], panels.items(), strict=False):
            for place, found in enumerate(values):
                bounds = (intervals or {}).get(name, [None] * len(rows))[place]
                if bounds:
                    axis.hlines(place, *bounds, color="C0", linewidth=5, alpha=0.25)
                axis.scatter(found, [place] * len(found), color="C0", s=18)
                if len(found) > 1:
                    axis.scatter(statistics.fmean(found), place, color=INK, marker="|", s=90)
            if name in base:
                axis.axvline(base[name], color=INK, linestyle="--", linewidth=1)
            axis.set(xlabel=name)
            axis.margins(x=0.12)
        axes[0, 0].set_yticks(range(len(rows)), rows)
        axes[0, 0].invert_yaxis()
        figure.savefig(path, dpi=150)
        plt.close(figure)
