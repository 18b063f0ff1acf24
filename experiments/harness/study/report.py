"""A study's results as JSON, as a table, and in words."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.harness.measures import compared_by
from experiments.harness.report import environment, machine, table
from experiments.harness.study.statistics import LEVEL
from lora_jax.tables import aligned
from lora_jax.training import records

LOSS = compared_by(None)
HEADER = ("cell", "trainable", "best rate", "tried", "seeds")
COSTS = {  # columns of what is known, and the unit that a number is divided by
    "forgotten": ("forgotten", 1.0, 3),
    "flops": ("GFLOP", 1e9, 1),
    "temp_bytes": ("temp MB", 1e6, 0),
    "peak_bytes": ("peak MB", 1e6, 0),
}
NOTE = (
    "Each cell runs at its own best learning rate; * marks one at "
    "the edge of those tried. Intervals are Student's t over seeds; differences are of the same "
    "seeds, and none is corrected for their number: of twenty true ties about one is told apart."
)
COSTS_NOTE = (
    "Forgotten: nats above the untuned base on the beginning of another text, the mean over seeds. "
    "FLOPs (10^9) and memory (MB) of one step are the compiler's: its temporaries, and these with "
    "base, adapter, optimizer and batch; empty where one device cannot take the step."
)


def write(workdir: Path, title: str, command: str, results: Mapping[str, Any]) -> None:
    """Writes `results.json` and `results.md`."""
    results = {"title": title, "command": command, **results, "environment": environment()}
    records.write_json(workdir / "results.json", results)
    lines = [f"# {title}", "", f"`{command}`", "", *table(header(results), cells(results)), ""]
    lines += [_note(results), "", *([COSTS_NOTE, ""] if _costs(results) else [])]
    lines += [findings(results), "", machine(results), ""]
    (workdir / "results.md").write_text("\n".join(lines))


def in_words(results: Mapping[str, Any]) -> str:
    """The table and the findings, for a terminal."""
    return f"\n{aligned([header(results), *cells(results)])}\n\n{findings(results)}"


def header(results: Mapping[str, Any]) -> tuple[str, ...]:
    by, extreme = _compared(results)["by"], _extreme(results)
    mean = "mean" if by == LOSS["by"] else f"mean {by}"
    against = (mean, "95 % interval", f"against the {extreme} mean, paired")
    return (*HEADER, *against, *_measured(results), *(COSTS[key][0] for key in _costs(results)))


def _costs(results: Mapping[str, Any]) -> list[str]:
    return [key for key in COSTS if any(cell.get(key) for cell in results["cells"])]


def _cost(cell: Mapping[str, Any], key: str) -> str:
    found, (_, unit, digits) = cell.get(key), COSTS[key]
    if not found:
        return ""
    value = statistics.fmean(found) if isinstance(found, list) else found
    return f"{value / unit:.{digits}f}"


def cells(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A cell a row."""
    best = leading(results)
    return [
        (
            cell["cell"],
            f"{cell['trainable_params']:,}",
            f"{cell['learning_rate']:.3g}{'*' if cell['edge'] else ''}",
            str(cell["tried"]),
            str(len(cell["losses"])),
            "-" if cell["mean"] is None else f"{cell['mean']:.4f}",
            _interval(cell["interval"]),
            f"the {_extreme(results)}" if cell is best else _against(results, cell, best),
            *(
                f"{statistics.fmean(cell['measured'][name]):.3f}" if cell["measured"] else ""
                for name in _measured(results)
            ),
            *(_cost(cell, key) for key in _costs(results)),
        )
        for cell in results["cells"]
    ]


def findings(results: Mapping[str, Any]) -> str:
    """Which cells differ from the best mean by more than seeds do."""
    best = leading(results)
    if best is None:
        return "Nothing has been run with several seeds yet."
    apart: list[str] = []
    together: list[str] = []
    for cell in results["cells"]:
        found = difference(results, cell["cell"], best["cell"])
        if cell is not best and found is not None:
            (apart if found["differ"] else together).append(cell["cell"])
    by, other = _compared(results)["by"], "Lower" if _compared(results)["highest"] else "Higher"
    what = "mean" if by == LOSS["by"] else f"mean {by}"
    said = f"{best['cell']} has the {_extreme(results)} {what}, {best['mean']:.4f}."
    if apart:
        said += f" {other} at {LEVEL:.0%}: {', '.join(apart)}."
    if together:
        said += f" Not told apart from it: {', '.join(together)}."
    return said if results["complete"] else f"{said} The study is not complete."


def leading(results: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The cell of the best mean, of those with an interval."""
    known = [cell for cell in results["cells"] if cell["interval"]]
    best = max if _compared(results)["highest"] else min
    return best(known, key=lambda cell: cell["mean"], default=None)


def _compared(results: Mapping[str, Any]) -> Mapping[str, Any]:
    return results.get("compared", LOSS)


def _extreme(results: Mapping[str, Any]) -> str:
    return "highest" if _compared(results)["highest"] else "lowest"


def _measured(results: Mapping[str, Any]) -> list[str]:
    """The names of what has been measured beside what cells are compared by."""
    by = _compared(results)["by"]
    names = dict.fromkeys(name for cell in results["cells"] for name in cell.get("measured", ()))
    return [name for name in names if name != by]


def _note(results: Mapping[str, Any]) -> str:
    compared = _compared(results)
    if compared["by"] == LOSS["by"]:
        return f"Losses are nats a counted token. {NOTE}"
    return f"{NOTE} The rate is that of the lowest validation loss, the cell's own."


def difference(results: Mapping[str, Any], one: str, other: str) -> dict[str, Any] | None:
    """The paired difference `one - other`."""
    for found in results["differences"]:
        if found["cells"] == [one, other]:
            return found
        if found["cells"] == [other, one]:
            low, high = found["interval"]
            return {**found, "mean": -found["mean"], "interval": [-high, -low]}
    return None


def _against(results: Mapping[str, Any], cell: Mapping[str, Any], best: Any) -> str:
    found = None if best is None else difference(results, cell["cell"], best["cell"])
    if found is None:
        return "-"
    return f"{found['mean']:+.4f}  {_interval(found['interval'])}"


def _interval(bounds: list[float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:.4f} to {bounds[1]:.4f}"
