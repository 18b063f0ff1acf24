"""The picture of a comparison of subspaces."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness.pictures import INK, STYLE, plt

NAMES = {"q_proj": "$\\Delta W_q$", "v_proj": "$\\Delta W_v$"}


def draw(path: Path, results: dict[str, Any]) -> None:
    """Overlaps as the paper draws them, of two ranks and of two seeds, each beside random updates;
    below them amplification by rank, spectra, and what repairs restore."""
    with plt.rc_context(STYLE):
        heights = [0.3 if "missing" in results[key] else 3.6 for key in ("ranks", "seeds")] + [3.9]
        figure = plt.figure(figsize=(11.5, sum(heights)), layout="constrained")
        rows: Any = figure.subfigures(3, 1, height_ratios=heights)
        for row, key, title in (
            (rows[0], "ranks", "Two ranks"),
            (rows[1], "seeds", "Two seeds"),
        ):
            _heat_maps(row, results[key], title)
        left, middle, right = rows[2].subplots(1, 3)
        _amplification(left, results)
        _spectra(middle, results)
        _repairs(right, results)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _heat_maps(figure, compared: dict[str, Any], title: str) -> None:
    if "missing" in compared:
        figure.suptitle(f"{title}: {compared['missing']}", fontsize=10)
        return
    one, other = compared["arms"]
    figure.suptitle(f"{title}: the overlap $\\phi(i, j)$ of what they read, mean over layers")
    axes = figure.subplots(1, 3)
    shown = _shown_targets(compared["targets"])
    panels = [(_named(target), compared["targets"][target]["other"]) for target in shown]
    if shown:
        panels.append(("beside a random update", compared["targets"][shown[0]]["random"]))
    for axis, (name, phi) in zip(axes, panels, strict=False):
        phi = np.asarray(phi)
        image = axis.imshow(
            phi, vmin=0, vmax=1, cmap="magma", aspect="auto", origin="upper",
            extent=(0.5, phi.shape[1] + 0.5, phi.shape[0] + 0.5, 0.5),
        )  # fmt: skip
        axis.grid(False)
        axis.set(title=name, xlabel=f"j, of {other if name[0] != 'b' else 'random factors'}")
        axis.set_xticks(_ticks(phi.shape[1]))
        axis.set_yticks(_ticks(phi.shape[0]))
        axis.text(
            phi.shape[1], phi.shape[0], f"all: {phi[-1, -1]:.2f}  first: {phi[0, 0]:.2f}",
            ha="right", va="bottom", fontsize=8, color="black",
            bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 2},
        )  # fmt: skip
    axes[0].set(ylabel=f"i, of {one}")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.9, pad=0.01)


def _amplification(axes, results: dict[str, Any]) -> None:
    """A point for each layer of each arm, and the mean over arms of a rank."""
    by_rank: dict[int, list[float]] = {}
    for row in results["arms"]:
        if row["rank"] is not None:
            for target in row["targets"].values():
                by_rank.setdefault(row["rank"], []).extend(target["amplification_by_layer"])
    ranks = sorted(by_rank)
    axes.set(title="Amplification", xlabel="rank", ylabel=r"$|\Delta W|\ /\ |U^T W V|$")
    if not ranks:
        return
    low, middle, high = np.array([np.percentile(by_rank[r], (10, 50, 90)) for r in ranks]).T
    axes.fill_between(ranks, low, high, color="C0", alpha=0.2, linewidth=0)
    axes.plot(ranks, middle, color="C0", marker="o")
    for rank, value in zip(ranks, middle, strict=True):
        axes.annotate(f"{value:.3g}", (rank, value), xytext=(0, 7), textcoords="offset points",
                      ha="center")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.text(0.98, 0.97, "median, 10 to 90 % of layers", transform=axes.transAxes, ha="right",
              va="top", fontsize=8)  # fmt: skip


def _spectra(axes, results: dict[str, Any]) -> None:
    """An arm for each rank and full fine-tuning, labelled at its end."""
    axes.set(title="Singular values of the update", xlabel="index", ylabel="over the largest, mean")
    shown: dict[Any, dict[str, Any]] = {}
    for row in results["arms"]:
        shown.setdefault("full" if row["full"] else row["rank"] or row["name"], row)
    shades = plt.colormaps["viridis"]
    for number, (name, row) in enumerate(shown.items()):
        target = row["targets"][_shown_targets(row["targets"])[0]]
        values = [value for value in target["spectrum"] if value > 1e-4]
        is_full = name == "full"
        color = INK if is_full else shades(0.85 * number / max(len(shown) - 1, 1))
        label = f"r = {name}" if isinstance(name, int) else str(name)
        places = range(1, len(values) + 1)
        axes.plot(places, values, color=color, marker="." if len(values) < 9 else None, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yscale("log")
    axes.legend(fontsize=8, loc="lower left", title=_named(_shown_targets(row["targets"])[0]))


def _repairs(axes, results: dict[str, Any]) -> None:
    """Against the task's loss the other text's, a line for each arm; without a text, by factor."""
    has_text = "text_loss" in results["base"]
    axes.set(title="Intruder dimensions scaled down")
    for number, arm in enumerate(results["restored"]):
        points, color = arm["points"], f"C{number}"
        tasks = [point["val_loss"] for point in points]
        others = [point["text_loss" if has_text else "factor"] for point in points]
        axes.plot(tasks, others, color=color, marker="o", markersize=4, label=arm["arm"])
        for point, x, y in zip(points, tasks, others, strict=True):
            axes.annotate(f"{point['factor']:g}", (x, y), xytext=(4, 3), fontsize=7,
                          textcoords="offset points", color=color)  # fmt: skip
    axes.set(xlabel="the task's validation loss",
             ylabel="another text's loss" if has_text else "factor")  # fmt: skip
    if has_text and results["restored"]:
        base = results["base"]["text_loss"]
        axes.axhline(base, color=INK, linestyle="--", linewidth=1, label=f"untuned, {base:.3f}")
    if results["restored"]:
        axes.legend(fontsize=8)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")


def _shown_targets(targets: dict[str, Any]) -> list[str]:
    """The paper's two where they are there, else the first two."""
    known = [path for name in NAMES for path in targets if path.split("/")[-1] == name]
    return (known or list(targets))[:2]


def _named(path: str) -> str:
    return NAMES.get(path.split("/")[-1], path)


def _ticks(count: int) -> list[int]:
    return sorted({1, *(count * part // 4 for part in (1, 2, 3, 4))} - {0})
