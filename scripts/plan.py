"""What a training step would take of a machine, from the compiler and before anything is rented.

    python scripts/plan.py --config=configs/llama8b.py --topology=v5e:4x4
    python scripts/plan.py --config=configs/llama8b.py --topology=v5e,v6e --search=topology
    python scripts/plan.py --config=configs/llama8b.py --topology=v6e:4x4 --search=batch

Compiles the config's real step, kernels and parallel mode included, for devices that need not be
there, with nothing but abstract arrays: no weights, no data. Topologies are those of
lora_jax/planning/chips.py: TPUs (v4, v5e, v5p, v6e, tpu7x), h100:N, h200:N, cpu and cpu:N. All but
cpu need the compilers of requirements-aot.txt. A step that does not fit is an error.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout, installed or not
os.environ["JAX_PLATFORMS"] = "cpu"  # devices that are there have no part in it

from absl import flags
from ml_collections import ConfigDict

from experiments.harness import budget, setup
from experiments.harness.main import launch

TOPOLOGY = flags.DEFINE_list(
    "topology", ["cpu"], "What to compile for; kinds of chip for --search=topology."
)
SEARCH = flags.DEFINE_enum(
    "search", None, ["topology", "batch"], "Finds the smallest machine, or the largest batch."
)


def work(config: ConfigDict, workdir: Path) -> None:
    del workdir
    setup.require_filled(config)
    budget.conduct(config, TOPOLOGY.value, SEARCH.value)


if __name__ == "__main__":
    launch("plan", work)
