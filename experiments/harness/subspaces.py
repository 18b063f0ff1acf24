"""Where the updates of saved arms point, how large they are, and what is new in them."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from experiments.harness.saved_arms import SavedArm
from lora_jax import paths
from lora_jax.interop import Pretrained
from lora_jax.methods import DeltaNode
from lora_jax.targets import rule_matcher
from lora_jax.transform import Delta, delta_nodes
from lora_jax.weights import PyTree

Results = dict[str, Any]
Say = Callable[[str], None]
Losses = Callable[[PyTree], dict[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line chooses.

    Attributes:
      targets: a preset, or a regular expression over the components of paths.
      ranks: the two whose directions are compared.
      top, threshold: of intruder dimensions.
      factors: to scale them by, 1 aside.
    """

    targets: str
    ranks: tuple[int, int]
    top: int
    threshold: float
    factors: tuple[float, ...]


def study(
    model: Pretrained, arms: Sequence[SavedArm], settings: Settings, losses: Losses, say: Say
) -> Results:
    """Diagnoses every arm, compares two ranks and two seeds, and repairs the best of each rank."""
    started = time.time()
    repairs = {arm.name for arm in _best_of_each_rank(arms)} if settings.factors else set()
    rows, restored = [], []
    untuned = losses(model.params) if repairs else {}
    for arm in arms:
        delta = arm.load(model)
        chosen = _targeted(delta, settings.targets, arm.name)
        found = lora.diagnose(model.params, chosen, top=settings.top, threshold=settings.threshold)
        rows.append(_row(arm, found))
        say(_in_words(rows[-1]))
        if arm.name in repairs:
            restored.append(_restored(model, arm, delta, found, settings.factors, losses))
    return {
        "base": {"name": model.name, "source": model.source, **untuned},
        "settings": dataclasses.asdict(settings),
        "arms": rows,
        "ranks": _compared(model, settings, *two_ranks(arms, settings.ranks)),
        "seeds": _compared(model, settings, *two_seeds(arms)),
        "restored": restored,
        "seconds": time.time() - started,
    }


def two_ranks(
    arms: Sequence[SavedArm], ranks: tuple[int, int]
) -> tuple[tuple[SavedArm, SavedArm] | None, str]:
    """The arms of the two ranks, of one seed where there is one, of the lowest losses; or why there
    are none."""
    few, many = ([arm for arm in arms if arm.rank == rank] for rank in ranks)
    pairs = sorted(
        itertools.product(few, many),
        key=lambda pair: (pair[0].seed != pair[1].seed, pair[0].order + pair[1].order),
    )
    known = ", ".join(str(rank) for rank in sorted({a.rank for a in arms if a.rank is not None}))
    missing = f"no arms of ranks {ranks[0]} and {ranks[1]}; there are {known or 'none'}: --ranks"
    return (pairs[0], "") if pairs else (None, missing)


def two_seeds(arms: Sequence[SavedArm]) -> tuple[tuple[SavedArm, SavedArm] | None, str]:
    """Two arms that differ in their seed alone, of the largest rank that has such."""
    pairs = [
        (one, other)
        for one, other in itertools.combinations(arms, 2)
        if one.rank is not None
        and (one.rank, one.learning_rate) == (other.rank, other.learning_rate)
        and None not in (one.seed, other.seed)
        and one.seed != other.seed
    ]
    pairs.sort(key=lambda pair: (-(pair[0].rank or 0), pair[0].order + pair[1].order))
    return (pairs[0], "") if pairs else (None, "no two arms that differ in their seed alone")


def _best_of_each_rank(arms: Sequence[SavedArm]) -> list[SavedArm]:
    best: dict[Any, SavedArm] = {}
    for arm in sorted(arms, key=lambda arm: arm.order):
        best.setdefault((arm.rank, arm.is_full), arm)
    return list(best.values())


def _targeted(delta: Delta, targets: str, name: str) -> Delta:
    """What a delta has at these targets, and what its nodes share."""
    matches = rule_matcher(targets)
    nodes = delta_nodes(delta)
    kept = {path: node for path, node in nodes.items() if matches(path) or not _has_a_weight(node)}
    if not any(map(_has_a_weight, kept.values())):
        raise ValueError(f"{name}: --targets={targets!r} matches none of {', '.join(nodes)}.")
    return paths.nest(kept)


def _has_a_weight(node: DeltaNode) -> bool:
    return not isinstance(node, lora.methods.Extra)


def _row(arm: SavedArm, found: lora.Diagnosis) -> Results:
    """The means over all layers of an arm, and of each target."""
    by_target = {path: _numbers(row) for path, row in found.targets.items()}
    layers = {path: row.rank.size for path, row in found.targets.items()}
    names = ("relative_norm", "amplification", "effective_rank", "rank_90", "intruders")
    mean = {
        name: float(
            np.average([t[name] for t in by_target.values()], weights=list(layers.values()))
        )
        for name in names
    }
    return {
        "name": arm.name,
        "rank": arm.rank,
        "full": arm.is_full,
        "learning_rate": arm.learning_rate,
        "seed": arm.seed,
        "val_loss": arm.val_loss,
        **mean,
        "layers": sum(layers.values()),
        "targets": by_target,
    }


def _numbers(row: Any) -> Results:
    spectrum = row.spectrum / np.where(row.is_zero, 1, row.spectral_norm)[..., None]
    spectrum = spectrum.reshape(-1, spectrum.shape[-1]).mean(0)
    return {
        "relative_norm": float(row.relative_norm.mean()),
        "amplification": float(row.amplification.mean()),
        "amplification_by_layer": _listed(row.amplification),
        "effective_rank": float(row.effective_rank.mean()),
        "rank_90": float(row.rank_for(0.9).mean()),
        "intruders": float(row.intruders.count.mean()),
        "smallest_cosine": float(row.intruders.cosines.min()),
        "spectrum": _listed(spectrum),  # over its largest, the mean over layers
    }


def _compared(
    model: Pretrained,
    settings: Settings,
    pair: tuple[SavedArm, SavedArm] | None,
    missing: str,
) -> Results:
    """`phi` of the two arms' input directions by target, the mean over layers, beside that of
    random factors of the second one's shape."""
    if pair is None:
        return {"missing": missing}
    one, other = (_targeted(arm.load(model), settings.targets, arm.name) for arm in pair)
    found = lora.diagnose(
        model.params, one, others={"other": other, "random": _random(other)}, top=0
    )
    by_target = {
        path: {name: _mean_phi(overlap.input) for name, overlap in row.overlaps.items()}
        for path, row in found.targets.items()
    }
    return {"arms": [arm.name for arm in pair], "targets": by_target}


def _random(delta: Delta) -> Delta:
    """The delta with normal numbers in the place of what trains."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf, trains: (
            jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) if trains else leaf
        ),
        delta,
        lora.trainable_mask(delta),
    )


def _mean_phi(phi: np.ndarray) -> list[list[float]]:
    return np.round(phi.reshape(-1, *phi.shape[-2:]).mean(0), 4).tolist()


def _restored(
    model: Pretrained,
    arm: SavedArm,
    delta: Delta,
    found: lora.Diagnosis,
    factors: Sequence[float],
    losses: Losses,
) -> Results:
    """The losses with the intruders' singular values times each factor."""
    intruders = [row.intruders for row in found.targets.values() if row.intruders]
    count = sum(int(each.count.sum()) for each in intruders)
    rest = {p: n for p, n in delta_nodes(delta).items() if p not in found.targets}
    points = []
    for factor in (1.0, *(factor for factor in factors if factor != 1 and count > 0)):
        repaired = paths.nest({**rest, **delta_nodes(found.repair(factor))})
        points.append({"factor": factor, **losses(lora.merge(model.params, repaired))})
    return {"arm": arm.name, "intruders": count, "points": points}


def _in_words(row: Mapping[str, Any]) -> str:
    return (
        f"{row['name']}: update {row['relative_norm']:.4f} of the weights, amplification "
        f"{row['amplification']:.2f}, {row['rank_90']:.1f} values for 90 %, "
        f"{row['intruders']:.2f} intruders a matrix"
    )


def _listed(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in np.ravel(values)]
