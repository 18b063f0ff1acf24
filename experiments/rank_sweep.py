"""How much rank does a task need? The rank sweep of the LoRA paper (Hu et al. 2021, section 7.2).

python experiments/rank_sweep.py
python experiments/rank_sweep.py --config=configs/llama8b.py --plan
python experiments/rank_sweep.py --config.sweep.ranks="(1, 8)" --config.train.steps=40
python experiments/rank_sweep.py --budget=cpu --config.data.path=E2E
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout, installed or not

from experiments.harness import pictures
from experiments.harness.arms import rank_arms, rank_cells
from experiments.harness.main import Lockstep, main
from experiments.harness.study import pictures as study_pictures
from experiments.harness.study.study import Study

if __name__ == "__main__":
    main(
        "rank_sweep",
        "Rank sweep",
        Study(cells=rank_cells, draw=study_pictures.loss_by_rank),
        Lockstep(arms=rank_arms, draw=pictures.loss_by_rank),
    )
