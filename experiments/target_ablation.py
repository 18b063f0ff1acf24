"""Which weights should be adapted? Q and V alone, attention, the MLP, or every linear layer.

At equal rank, and at equal parameters as in the LoRA paper (Hu et al. 2021, section 7.1).

    python experiments/target_ablation.py
    python experiments/target_ablation.py --config.ablation.rank=4
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout, installed or not

from experiments.harness import pictures, plan
from experiments.harness.arms import target_arms
from experiments.harness.main import main

if __name__ == "__main__":
    main(
        "target_ablation",
        "Target ablation",
        lambda config: target_arms(config, plan.params_per_rank(config)),
        pictures.loss_by_targets,
        sized=True,
    )
