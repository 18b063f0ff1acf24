"""A comparison of methods: each at sizes that meet the same budgets of trained parameters."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

import lora_jax as lora
from experiments.harness import plan, setup
from experiments.harness.arms import AnyMethod, Arm
from experiments.harness.costs import step_costs
from lora_jax.weights import PyTree


@dataclasses.dataclass(frozen=True)
class MethodArms:
    """A method of the comparison, and the arms that are made of it.

    Attributes:
      method: a function of the size, which then follows from the budget; or a method of a size of
        its own.
      rate: the learning rate from which the search for its best starts.
      targets: for a single method.
      b_ratio, project_b, in_peft: as in `Arm`.
    """

    method: AnyMethod | Callable[[int], AnyMethod]
    rate: float
    targets: str | tuple[str, ...] = "all-linear"
    b_ratio: float = 1.0
    project_b: bool = False
    in_peft: bool = True


def method_cells(config: ConfigDict, method_arms: Mapping[str, MethodArms]) -> list[Arm]:
    """Every method at every budget; those of a size of their own once. With
    `config.methods.fixed_rate` all of them again at that rate.

    Raises:
      ValueError: for a name that is no method's, or no ranks.
    """
    settings = config.methods
    unknown = [name for name in settings.names if name not in method_arms]
    if unknown:
        raise ValueError(
            f"config.methods.names has {unknown[0]!r}: expected some of {', '.join(method_arms)}."
        )
    if not settings.ranks:
        raise ValueError("config.methods.ranks is empty: LoRA's rank is what sets a budget.")
    params = plan.abstract_params(config)
    cells = [
        cell
        for name in tuple(settings.names) or method_arms
        for cell in _sized(config, name, method_arms[name], params)
    ]
    if not settings.fixed_rate:
        return cells
    return cells + [_fixed(cell, settings.fixed_rate) for cell in cells]


def with_costs(config: ConfigDict, cells: Sequence[Arm], results: dict[str, Any]) -> dict[str, Any]:
    """The results with what a step of each cell costs."""
    shape = setup.shape_of(config)
    by_name = {cell.cell: cell for cell in cells}
    costed = [
        {**found, **step_costs(config, by_name[found["cell"]], shape)} for found in results["cells"]
    ]
    return {**results, "cells": costed}


def _sized(config: ConfigDict, name: str, entry: MethodArms, params: PyTree) -> list[Arm]:
    if not callable(entry.method):
        return [_cell(name, name, entry, entry.method, None)]
    cells = []
    for rank in config.methods.ranks:
        budget = plan.describe_arm(params, lora.LoRA(rank=rank), "all-linear").trainable_params
        size = _size(params, entry.method, entry.targets, budget)
        cells.append(_cell(f"{name} {size}", name, entry, entry.method(size), size))
    return cells


def _cell(cell: str, label: str, entry: MethodArms, method: AnyMethod, size: int | None) -> Arm:
    return Arm(
        name=cell,
        cell=cell,
        rank=size,
        targets=entry.targets,
        method=method,
        learning_rate=entry.rate,
        seed=0,
        label=label,
        group="tuned",
        b_ratio=entry.b_ratio,
        project_b=entry.project_b,
        in_peft=entry.in_peft,
    )


def _fixed(cell: Arm, rate: float) -> Arm:
    name = f"{cell.cell} at {rate:g}"
    return dataclasses.replace(
        cell, name=name, cell=name, learning_rate=rate, fixed_rate=True, group="fixed"
    )


def _size(params: PyTree, method: Callable, targets: Any, budget: int) -> int:
    """The size whose trainable parameters, which grow linearly, come nearest to the budget."""
    one, two = (plan.describe_arm(params, method(n), targets).trainable_params for n in (1, 2))
    return max(1, 1 + round((budget - one) / (two - one)))
