"""How much rank does reinforcement learning need? GRPO with a reward by rule.

Sums of two numbers, to be answered by the number alone (`harness/sums.py`): a group of answers to
each prompt is sampled, and each is worth what its reward is above its group's. Cells are ranks,
full fine-tuning, and a handful of parameters, IA3 on the values of attention alone. "LoRA Without
Regret" (2025) finds that rank 1 is enough for reinforcement learning, since a reward holds few
bits; TinyLoRA (2026) that far less is. Losses in the records are 1 - reward.

Without --budget: rank 1 alone, with one seed and at one rate.

    python experiments/reinforce.py
    python experiments/reinforce.py --config.reinforce.on_error=skip
    python experiments/reinforce.py --budget=cpu
"""

import sys
from pathlib import Path

from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout, installed or not

import lora_jax as lora
from experiments.harness import measure_pictures, sums
from experiments.harness.arms import Arm, as_cells, rank_arms
from experiments.harness.main import Lockstep, main
from experiments.harness.reinforcement import Rewarded, loading, measures, require_possible
from experiments.harness.study.study import Study

IA3_RATIO = 20.0  # of the learning rates of IA3, whose scales begin at 1, and LoRA


def policy_arms(config: ConfigDict) -> list[Arm]:
    """Every rank of `config.sweep`, full fine-tuning, and IA3 on the values, where configured."""
    require_possible(config)
    single = config.copy_and_resolve_references()
    single.sweep.learning_rates, single.sweep.seeds = (), config.sweep.seeds[:1]
    arms = rank_arms(single)
    return [*arms, _ia3(config)] if config.reinforce.ia3 else arms


def _ia3(config: ConfigDict) -> Arm:
    return Arm(
        name="IA3 of values",
        rank=None,
        targets="v_proj",
        method=lora.IA3(),
        learning_rate=config.train.learning_rate * IA3_RATIO,
        seed=config.sweep.seeds[0],
    )


def task() -> Rewarded:
    """The sums and their reward."""
    train, held_out = sums.examples()
    return Rewarded(train=train, held_out=held_out, reward=sums.reward)


if __name__ == "__main__":
    main(
        "reinforce",
        "Reinforcement",
        Study(
            cells=lambda config: as_cells(policy_arms(config)),
            draw=measure_pictures.by_cell,
            load=loading(task()),
            measures=measures(task()),
        ),
        Lockstep(arms=policy_arms, draw=measure_pictures.by_arm),
        config_file="reinforce",
    )
