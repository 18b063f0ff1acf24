"""The arms of a sweep: what differs between them, as values."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax.methods import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One run of a sweep. Rank None is full fine-tuning."""

    name: str
    rank: int | None
    targets: str
    method: Method
    learning_rate: float
    seed: int
    group: str = ""


def rank_arms(config: ConfigDict) -> list[Arm]:
    """Every rank at every learning rate and seed; full fine-tuning too where asked for.

    Raises:
      ValueError: for no ranks, or one below 1.
    """
    if not config.sweep.ranks:
        raise ValueError("config.sweep.ranks is empty: a rank sweep needs at least one rank.")
    arms = [
        _lora_arm(config, rank, config.lora.targets, rate, seed)
        for rank in config.sweep.ranks
        for rate, seed in _rates_and_seeds(config)
    ]
    if config.sweep.full:
        arms += [_full_arm(config.sweep.full_learning_rate, seed) for seed in config.sweep.seeds]
    return arms


def target_arms(config: ConfigDict, per_rank: Mapping[str, int]) -> list[Arm]:
    """Every target preset at equal rank, and at equal parameters.

    Args:
      config: its `ablation` names the presets and the rank.
      per_rank: the trainable parameters of each preset at rank 1. The budget is what the largest
        trains at the given rank; each preset's rank is what comes nearest to it.
    """
    rank = config.ablation.rank
    budget = max(per_rank.values()) * rank
    presets = list(itertools.product(per_rank, _rates_and_seeds(config)))
    at_rank = [
        _lora_arm(config, rank, targets, rate, seed, group="equal rank")
        for targets, (rate, seed) in presets
    ]
    at_budget = [
        _lora_arm(
            config,
            max(1, round(budget / per_rank[targets])),
            targets,
            rate,
            seed,
            group="equal parameters",
        )
        for targets, (rate, seed) in presets
    ]
    return at_rank + at_budget


def same_kind(arms: Sequence[Arm]) -> list[list[Arm]]:
    """The arms in groups that can share one compiled step: those of one method."""
    kinds = dict.fromkeys(type(arm.method) for arm in arms)
    return [[arm for arm in arms if type(arm.method) is kind] for kind in kinds]


def _rates_and_seeds(config: ConfigDict) -> list[tuple[float, int]]:
    rates = tuple(config.sweep.learning_rates) or (config.train.learning_rate,)
    return list(itertools.product(rates, config.sweep.seeds))


def _lora_arm(
    config: ConfigDict, rank: int, targets: str, rate: float, seed: int, group: str = ""
) -> Arm:
    parts = [group, targets, f"r{rank}", f"lr{rate:g}", f"seed{seed}"]
    return Arm(
        name=" ".join(part for part in parts if part),
        rank=rank,
        targets=targets,
        method=lora.LoRA(rank=rank, **config.lora.method),
        learning_rate=rate,
        seed=seed,
        group=group,
    )


def _full_arm(rate: float, seed: int) -> Arm:
    return Arm(
        name=f"full lr{rate:g} seed{seed}",
        rank=None,
        targets=".*",
        method=lora.Full(),
        learning_rate=rate,
        seed=seed,
    )
