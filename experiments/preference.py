"""Which preference loss? DPO and its kin beside supervised tuning on the chosen answers.

Descriptions of restaurants, true ones preferred to untrue ones. Each loss is a cell at its own best
learning rate, found by its own validation loss, and over seeds; since losses of different names
cannot be compared, cells are by their win rate: how often an answer makes fewer mistakes than the
untuned base's, by a rule that needs no judge (`harness/preference_measures.py`). The reference of
DPO, length-normalised DPO, IPO and KTO is the base itself; SimPO and ORPO have none.

Without --budget: DPO and supervised tuning, with one seed and at one rate each.

    python experiments/preference.py
    python experiments/preference.py --config.preference.losses="('dpo', 'simpo')"
    python experiments/preference.py --budget=cpu --config.study.other_text=TEXT
"""

import sys
from pathlib import Path

from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout, installed or not

import lora_jax as lora
from experiments.harness import measure_pictures
from experiments.harness.arms import Arm, as_cells
from experiments.harness.main import Lockstep, main
from experiments.harness.preference_measures import MEASURES, require_checkable
from experiments.harness.study.study import Study

NAMES = {
    "next_token": "chosen alone",
    "dpo": "DPO",
    "dpo_norm": "DPO, length-normalised",
    "ipo": "IPO",
    "kto": "KTO",
    "simpo": "SimPO",
    "orpo": "ORPO",
}


def loss_arms(config: ConfigDict) -> list[Arm]:
    """An arm for each loss of `config.preference.losses`.

    Raises:
      ValueError: for no losses, or one that learns from no pairs.
    """
    require_checkable(config)
    wanted = tuple(config.preference.losses)
    unknown = [name for name in wanted if name not in NAMES]
    if unknown or not wanted:
        found = repr(unknown[0]) if unknown else "nothing"
        raise ValueError(
            f"config.preference.losses has {found}: expected some of {', '.join(NAMES)}."
        )
    return [_arm(config, loss) for loss in wanted]


def loss_cells(config: ConfigDict) -> list[Arm]:
    """Every loss that the config names, as a cell."""
    return as_cells(loss_arms(config))


def _arm(config: ConfigDict, loss: str) -> Arm:
    settings = config.preference
    return Arm(
        name=NAMES[loss],
        rank=settings.rank,
        targets=config.lora.targets,
        method=lora.LoRA(rank=settings.rank, **config.lora.method),
        learning_rate=config.train.learning_rate,
        seed=config.sweep.seeds[0],
        label=NAMES[loss],
        loss=loss,
    )


if __name__ == "__main__":
    main(
        "preference",
        "Preferences",
        Study(cells=loss_cells, draw=measure_pictures.by_cell, measures=MEASURES),
        Lockstep(arms=loss_arms, draw=measure_pictures.by_arm),
        config_file="preference",
    )
