"""The record of a comparison of subspaces: JSON, tables, and a line for each claim."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness import report
from experiments.harness.progress import console
from lora_jax.tables import aligned
from lora_jax.training import records

Results = Mapping[str, Any]
HEADER = ("arm", "rank", "rate", "seed", "val loss", "norm / weight's", "amplification",
          "eff. rank", "values for 90 %", "intruders a matrix")  # fmt: skip
NOTE = (
    "Means over all layers of all targets. Amplification is |dW| / |U^T W V| (LoRA 7.3); the "
    'effective rank is Roy and Vetterli\'s; "values for 90 %" are the singular values that hold 90 '
    "% of the update's squared norm; intruders are those among the leading singular vectors of the "
    "tuned weight whose cosine with all of the frozen one's is below the threshold."
)


def write(workdir: Path, title: str, command: str, results: dict[str, Any]) -> dict[str, Any]:
    """Writes `results.json` and `results.md`, and prints the tables and the findings."""
    results = {
        "title": title,
        "command": command,
        **results,
        "findings": findings(results),
        "environment": report.environment(),
    }
    records.write_json(workdir / "results.json", results)
    cells, repairs = [arm_cells(row) for row in results["arms"]], restored_cells(results)
    lines = [f"# {title}", "", f"`{command}`", "", *report.table(HEADER, cells), "", NOTE, ""]
    console.print(f"\n[bold]{title}[/bold]")
    console.print(aligned([HEADER, *cells]), markup=False)
    if repairs:
        header = ("arm", "intruders", "times", "task's loss", "other text's loss")
        lines += [*report.table(header, repairs), ""]
        console.print(f"\n{aligned([header, *repairs])}", markup=False)
    lines += [f"- {line}" for line in results["findings"]]
    lines += ["", report.machine(results), ""]
    (workdir / "results.md").write_text("\n".join(lines))
    console.print("\n" + "\n".join(results["findings"]), markup=False)
    return results


def arm_cells(row: Results) -> tuple[str, ...]:
    return (
        row["name"],
        "full" if row["full"] else _shown(row["rank"], "d"),
        _shown(row["learning_rate"], "g"),
        _shown(row["seed"], "d"),
        _shown(row["val_loss"], ".4f"),
        f"{row['relative_norm']:.4f}",
        f"{row['amplification']:.2f}",
        f"{row['effective_rank']:.1f}",
        f"{row['rank_90']:.1f}",
        f"{row['intruders']:.2f}",
    )


def restored_cells(results: Results) -> list[tuple[str, ...]]:
    """The untuned base, and every repaired arm by factor."""
    if not results["restored"]:
        return []
    base = results["base"]
    losses = [_shown(base.get(name), ".4f") for name in ("val_loss", "text_loss")]
    cells = [(f"{base['name']}, untuned", "", "", *losses)]
    for arm in results["restored"]:
        for point in arm["points"]:
            losses = [_shown(point.get(name), ".4f") for name in ("val_loss", "text_loss")]
            cells.append((arm["arm"], str(arm["intruders"]), f"{point['factor']:g}", *losses))
    return cells


def findings(results: Results) -> list[str]:
    """A line for each claim: what these arms show of it, or what is missing."""
    return [
        _overlap_line("Ranks", results["ranks"]),
        _overlap_line("Seeds", results["seeds"]),
        _amplification_line(results),
        _rank_line(results),
        _intruder_line(results),
        *_restored_lines(results),
    ]


def mean_phi(compared: Results, name: str, i: int, j: int) -> float:
    """The mean over targets of `phi(i, j)`, counted from 1; -1 is all directions."""
    place = [index - 1 if index > 0 else index for index in (i, j)]
    found = [np.asarray(target[name])[*place] for target in compared["targets"].values()]
    return float(np.mean(found))


def _overlap_line(what: str, compared: Results) -> str:
    if "missing" in compared:
        return f"{what}: {compared['missing']}."
    one, other = compared["arms"]
    first, all_of = ((1, 1), (-1, -1))
    return (
        f"{what}: {one} and {other} overlap by {mean_phi(compared, 'other', *first):.3f} in their "
        f"leading direction and by {mean_phi(compared, 'other', *all_of):.3f} in all; a random "
        f"update by {mean_phi(compared, 'random', *first):.3f} and "
        f"{mean_phi(compared, 'random', *all_of):.3f} (means over targets and layers)."
    )


def _amplification_line(results: Results) -> str:
    by_rank: dict[int, list[float]] = {}
    for row in results["arms"]:
        if row["rank"] is not None:
            by_rank.setdefault(row["rank"], []).append(row["amplification"])
    if not by_rank:
        return "Amplification: no arm has a rank."
    told = ", ".join(f"{np.mean(by_rank[r]):.2f} at r = {r}" for r in sorted(by_rank))
    return f"Amplification: {told}."


def _rank_line(results: Results) -> str:
    full = [row["rank_90"] for row in results["arms"] if row["full"]]
    ranked = {row["name"]: row["rank_90"] for row in results["arms"] if row["rank"] is not None}
    if not full or not ranked:
        return "Spectra: no full update beside a low-rank one."
    times = {name: np.mean(full) / max(value, 1) for name, value in ranked.items()}
    return (
        f"Spectra: 90 % of a full update take {np.mean(full):.1f} singular values a matrix, "
        f"{min(times.values()):.1f} to {max(times.values()):.1f} times those of the others."
    )


def _intruder_line(results: Results) -> str:
    told = ", ".join(f"{row['name']} {row['intruders']:.2f}" for row in results["arms"])
    top = results["settings"]["top"]
    return f"Intruders among the {top} leading directions, a matrix: {told}."


def _restored_lines(results: Results) -> list[str]:
    lines = []
    for arm in results["restored"]:
        first, *others = arm["points"]
        if not others:
            lines.append(f"Repair: {arm['arm']} has no intruder.")
        for point in others:
            task = point["val_loss"] - first["val_loss"]
            line = (
                f"Repair: {arm['arm']}, {arm['intruders']} intruders times {point['factor']:g}: "
                f"the task's loss {task:+.4f}"
            )
            if "text_loss" in point:
                line += f", the other text's {point['text_loss'] - first['text_loss']:+.4f}"
                forgotten = first["text_loss"] - results["base"]["text_loss"]
                line += f" of {forgotten:+.4f} that tuning added"
            lines.append(f"{line}.")
    return lines


def _shown(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)
