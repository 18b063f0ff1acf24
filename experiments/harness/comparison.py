"""A comparison of methods: their arms, and the summary and findings of their results."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

import lora_jax as lora
from experiments.harness import devices, plan, setup
from experiments.harness.arms import AnyMethod, Arm
from experiments.harness.costs import step_costs
from experiments.harness.outcome import Outcome
from lora_jax.weights import PyTree


@dataclasses.dataclass(frozen=True)
class MethodArms:
    """A method of the comparison, and the arms that are made of it.

    Attributes:
      method: a function of the size, which then follows from the budget; or a method of a size of
        its own.
      rate: the learning rate around which it is swept.
      targets: for a single method.
      b_ratio, project_b, in_peft: as in `Arm`.
    """

    method: AnyMethod | Callable[[int], AnyMethod]
    rate: float
    targets: str | tuple[str, ...] = "all-linear"
    b_ratio: float = 1.0
    project_b: bool = False
    in_peft: bool = True


def first_arms(config: ConfigDict, method_arms: Mapping[str, MethodArms]) -> list[Arm]:
    """Every method at every learning rate, with the first seed.

    Raises:
      ValueError: for a name that is no method's, no rates, no seeds, or arms that
        `config.parallel.arms` does not divide, those of further seeds included.
    """
    settings = config.methods
    unknown = [name for name in settings.names if name not in method_arms]
    if unknown:
        raise ValueError(
            f"config.methods.names has {unknown[0]!r}: expected some of {', '.join(method_arms)}."
        )
    if not settings.rate_factors or not settings.seeds:
        raise ValueError("config.methods needs at least one of rate_factors and one of seeds.")
    params = plan.abstract_params(config)
    reference = lora.LoRA(rank=settings.rank)
    budget = plan.describe_arm(params, reference, "all-linear").trainable_params
    arms = [
        arm
        for name in tuple(settings.names) or method_arms
        for arm in _arms(config, name, method_arms[name], params, budget)
    ]
    further = [_with_seed(arms[0], seed) for seed in settings.seeds[1:]]  # one of each method
    devices.require_even_arms(config, [*arms, *further])
    return arms


def more_seeds(config: ConfigDict, outcomes: Sequence[Outcome]) -> list[Arm]:
    """The further seeds of each method, at the learning rate that was best with the first."""
    first, *others = config.methods.seeds
    best: dict[str, Arm] = {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.order):
        if outcome.arm.seed == first:
            best.setdefault(outcome.arm.label, outcome.arm)
    trained = {outcome.arm.name for outcome in outcomes}
    arms = [_with_seed(best[label], seed) for label in _labels(outcomes) for seed in others]
    return [arm for arm in arms if arm.name not in trained]


def summarised(config: ConfigDict, results: dict[str, Any], arms: Sequence[Arm]) -> dict[str, Any]:
    """The results with a `summary`, a record for each method, and `findings` in a sentence."""
    shape = setup.shape_of(config)
    summary = []
    for arm in {arm.label: arm for arm in arms}.values():
        rows = [row for row in results["arms"] if row["label"] == arm.label]
        trained = {"method": arm.label, "size": arm.rank, **_trained(rows)}
        summary.append({**trained, **step_costs(config, arm, shape)})
    return {**results, "summary": summary, "findings": findings(summary)}


def findings(summary: Sequence[Mapping[str, Any]]) -> str:
    """The differences that are larger than the spread over seeds: two methods differ where the
    ranges of their losses over seeds do not overlap."""
    finished = [row for row in summary if row["val_losses"]]
    seeds = min((len(row["val_losses"]) for row in finished), default=0)
    if seeds < 2:
        return "One seed shows no spread: no order of the methods should be read into this."
    best = min(finished, key=lambda row: row["mean"])
    others = [row for row in finished if row is not best]
    apart = [row["method"] for row in others if min(row["val_losses"]) > max(best["val_losses"])]
    inside = [row["method"] for row in others if row["method"] not in apart]
    said = f"{best['method']} has the lowest mean loss. "
    if inside:
        said += (
            f"Inside its spread over {seeds} seeds lie {', '.join(inside)}: no order should be "
            "read into these and it. "
        )
    return said + (f"Outside lie {', '.join(apart)}." if apart else "None lies outside.")


def _arms(
    config: ConfigDict, name: str, entry: MethodArms, params: PyTree, budget: int
) -> list[Arm]:
    method, size = entry.method, None
    if callable(method):
        size = _size(params, method, entry.targets, budget)
        method = method(size)
    arm = Arm(
        name=name,
        rank=size,
        targets=entry.targets,
        method=method,
        learning_rate=entry.rate,
        seed=0,
        label=name,
        b_ratio=entry.b_ratio,
        project_b=entry.project_b,
        in_peft=entry.in_peft,
    )
    rates = [entry.rate * factor for factor in config.methods.rate_factors]
    return [
        _with_seed(dataclasses.replace(arm, learning_rate=rate), config.methods.seeds[0])
        for rate in rates
    ]


def _size(params: PyTree, method: Callable, targets: Any, budget: int) -> int:
    """The size whose trainable parameters, which grow linearly, come nearest to the budget."""
    one, two = (plan.describe_arm(params, method(n), targets).trainable_params for n in (1, 2))
    return max(1, 1 + round((budget - one) / (two - one)))


def _with_seed(arm: Arm, seed: int) -> Arm:
    name = f"{arm.label} lr {arm.learning_rate:g} seed {seed}"
    return dataclasses.replace(arm, seed=seed, data_seed=seed, name=name)


def _labels(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(outcome.arm.label for outcome in outcomes))


def _trained(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The results of one method: the losses of all seeds at the rate of the lowest."""
    by_rate: dict[float, list[float]] = {}
    for row in rows:
        if row["val_loss"] is not None:
            by_rate.setdefault(row["learning_rate"], []).append(row["val_loss"])
    # The first seed chose the rate, and the others ran at that rate alone.
    rate = min(by_rate, key=lambda rate: by_rate[rate][0], default=None)
    losses = [] if rate is None else by_rate[rate]
    return {
        "trainable_params": rows[0]["trainable_params"],
        "learning_rate": rate,
        "val_losses": losses,
        "mean": statistics.mean(losses) if losses else None,
    }
