"""The arms of a sweep: what differs between them, as values."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax.methods import Method

AnyMethod = Method | Mapping[str, Method | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One run of a sweep.

    Attributes:
      name: unique in the sweep.
      rank: of the method, where it has one.
      targets: for a single method.
      method: what trains; also a mapping `{target: method}`.
      learning_rate: the peak.
      seed: of the initialisation and of dropout.
      data_seed: added to the data's seed; arms of one data_seed get the same batches.
      cell: what a study compares, its arms but for rate and seed; see `study`.
      fixed_rate: whether a study takes the learning rate as it is.
      label: the method's name, where an experiment compares methods.
      group: distinguishes arms of one label or target in a picture.
      b_ratio: LoRA+'s ratio of learning rates.
      project_b: whether the gradient of B is LoRA-FA's.
      in_peft: whether PEFT's format has the adapter.
      loss: what it learns by; empty is `config.train.loss`.
      settings: of the loss, by keyword, such as DPO's beta.
    """

    name: str
    rank: int | None
    targets: str | tuple[str, ...]
    method: AnyMethod
    learning_rate: float
    seed: int
    data_seed: int = 0
    cell: str = ""
    fixed_rate: bool = False
    label: str = ""
    group: str = ""
    b_ratio: float = 1.0
    project_b: bool = False
    in_peft: bool = True
    loss: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The name as one of a folder."""
        return re.sub(r"[^\w.+-]+", "_", self.name)

    @property
    def step(self) -> Hashable:
        """The same for arms that train through one compiled step."""
        return type(self.method), self.label, self.loss, tuple(self.settings)


def rank_arms(config: ConfigDict) -> list[Arm]:
    """Every rank at every learning rate and seed; full fine-tuning too where configured.

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
        arms += [_full_arm(config, seed) for seed in config.sweep.seeds]
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
    arms = []
    for targets, (rate, seed) in itertools.product(per_rank, _rates_and_seeds(config)):
        equal = max(1, round(budget / per_rank[targets]))
        both = equal == rank
        group = "equal rank and parameters" if both else "equal rank"
        arms.append(_lora_arm(config, rank, targets, rate, seed, group))
        if not both:
            arms.append(_lora_arm(config, equal, targets, rate, seed, "equal parameters"))
    return sorted(arms, key=lambda arm: arm.group == "equal parameters")


def rank_cells(config: ConfigDict) -> list[Arm]:
    """Every rank, and full fine-tuning where configured; see `rank_arms`."""
    return as_cells(rank_arms(_of_one_rate_and_seed(config)))


def target_cells(config: ConfigDict, per_rank: Mapping[str, int]) -> list[Arm]:
    """Every preset at equal rank and at equal parameters; see `target_arms`."""
    return as_cells(target_arms(_of_one_rate_and_seed(config), per_rank))


def as_cells(arms: Sequence[Arm]) -> list[Arm]:
    """The arms as what a study compares, each named after its own."""
    return [dataclasses.replace(arm, cell=arm.name) for arm in arms]


def same_step(arms: Sequence[Arm]) -> list[Sequence[Arm]]:
    """The arms in groups that train through one compiled step."""
    return _grouped(arms, lambda arm: arm.step)


def trained_together(arms: Sequence[Arm]) -> list[Sequence[Arm]]:
    """The arms in groups that can train together: of one step and the same batches."""
    return _grouped(arms, lambda arm: (arm.step, arm.data_seed))


def _grouped(arms: Sequence[Arm], key: Callable[[Arm], Hashable]) -> list[Sequence[Arm]]:
    groups: dict[Hashable, list[Arm]] = {}
    for arm in arms:
        groups.setdefault(key(arm), []).append(arm)
    return list(groups.values())


def _of_one_rate_and_seed(config: ConfigDict) -> ConfigDict:
    single = config.copy_and_resolve_references()
    single.sweep.learning_rates, single.sweep.seeds = (), (0,)
    return single


def _rates_and_seeds(config: ConfigDict) -> list[tuple[float, int]]:
    rates = tuple(config.sweep.learning_rates) or (config.train.learning_rate,)
    return list(itertools.product(rates, config.sweep.seeds))


def _lora_arm(
    config: ConfigDict, rank: int, targets: str, rate: float, seed: int, group: str = ""
) -> Arm:
    return Arm(
        name=f"{targets} r{rank}{_suffix(config, rate, seed)}",
        rank=rank,
        targets=targets,
        method=lora.LoRA(rank=rank, **config.lora.method),
        learning_rate=rate,
        seed=seed,
        group=group,
    )


def _suffix(config: ConfigDict, rate: float, seed: int) -> str:
    """The part of a name that distinguishes arms of one rank, where there are several."""
    rate_part = f" lr {rate:g}" if len(config.sweep.learning_rates) > 1 else ""
    seed_part = f" seed {seed}" if len(config.sweep.seeds) > 1 else ""
    return rate_part + seed_part


def _full_arm(config: ConfigDict, seed: int) -> Arm:
    return Arm(
        name=f"full seed {seed}" if len(config.sweep.seeds) > 1 else "full",
        rank=None,
        targets=".*",
        method=lora.Full(),
        learning_rate=config.sweep.full_learning_rate,
        seed=seed,
        in_peft=False,
    )
