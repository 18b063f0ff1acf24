"""Which weights should be adapted? Q and V alone, attention, the MLP, or every linear layer.

At equal rank, and at equal parameters as in the LoRA paper (Hu et al. 2021, section 7.1).

    python experiments/target_ablation.py
    python experiments/target_ablation.py --config.ablation.rank=4
    python experiments/target_ablation.py --budget=cpu --config.data.path=E2E
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout, installed or not

from experiments.harness import pictures, plan
from experiments.harness.arms import target_arms, target_cells
from experiments.harness.main import Lockstep, main
from experiments.harness.study import pictures as study_pictures
from experiments.harness.study.study import Study

if __name__ == "__main__":
    main(
        "target_ablation",
        "Target ablation",
        Study(
            cells=lambda config: target_cells(config, plan.params_per_rank(config)),
            draw=study_pictures.loss_by_targets,
            sized=True,
        ),
        Lockstep(
            arms=lambda config: target_arms(config, plan.params_per_rank(config)),
            draw=pictures.loss_by_targets,
        ),
    )
