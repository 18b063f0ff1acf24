"""Which learning rate? LoRA's best beside full fine-tuning's, over ranks, scalings and starts.

Four beliefs, each a group of cells of one study: LoRA's best rate is about ten times that of full
fine-tuning and nearly the same at every rank ("LoRA Without Regret", 2025); alpha / sqrt(r) serves
high ranks better than alpha / r (rsLoRA, arXiv:2312.03732); a zero A beside a random B is the worse
start (arXiv:2406.08447) or the better one (marin #4556); a larger rate for B helps (LoRA+,
arXiv:2402.12354). Each cell runs at its own best rate and over seeds.

    python experiments/learning_rates.py --budget=cpu --config.data.path=E2E
    python experiments/learning_rates.py --config.sweep.ranks="(4, 16)"
"""

import sys
from pathlib import Path

from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout, installed or not

import lora_jax as lora
from experiments.harness.arms import Arm, as_cells
from experiments.harness.main import main
from experiments.harness.study import pictures
from experiments.harness.study.study import Study

SCALED, ROOT, START, PLUS, FULL = "alpha / r", "alpha / sqrt(r)", "zero A", "LoRA+", "full"


def rate_cells(config: ConfigDict) -> list[Arm]:
    """Every rank with both scalings; the middle one with the other start and with LoRA+; full
    fine-tuning.

    Raises:
      ValueError: for no ranks.
    """
    ranks = sorted(config.sweep.ranks)
    if not ranks:
        raise ValueError("config.sweep.ranks is empty: expected at least one rank.")
    middle = ranks[len(ranks) // 2]
    cells = [_lora(config, rank, SCALED) for rank in ranks]
    cells += [_lora(config, rank, ROOT, scaling="rslora") for rank in ranks]
    cells += [_lora(config, middle, START, init="zero_a")]
    cells += [_lora(config, middle, PLUS, b_ratio=16.0)]
    full = Arm(
        name=FULL,
        rank=None,
        targets=".*",
        method=lora.Full(),
        learning_rate=config.sweep.full_learning_rate,
        seed=0,
        label=FULL,
        group=FULL,
        in_peft=False,
    )
    return as_cells([*cells, full])


def _lora(config: ConfigDict, rank: int, group: str, *, b_ratio: float = 1.0, **method) -> Arm:
    return Arm(
        name=f"r{rank}, {group}",
        rank=rank,
        targets=config.lora.targets,
        method=lora.LoRA(rank=rank, **{**config.lora.method, **method}),
        learning_rate=config.train.learning_rate,
        seed=0,
        label=group,
        group=group,
        b_ratio=b_ratio,
    )


if __name__ == "__main__":
    main("learning_rates", "Learning rates", Study(cells=rate_cells, draw=pictures.loss_by_rate))
