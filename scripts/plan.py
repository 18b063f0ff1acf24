"""What a training step or a server would take of a machine, from the compiler, before renting one.

    python scripts/plan.py --config=configs/llama8b.py --topology=v5e:4x4
    python scripts/plan.py --config=configs/llama8b.py --topology=v5e,v6e --search=topology
    python scripts/plan.py --config=configs/llama8b.py --topology=v6e:4x4 --search=batch
    python scripts/plan.py --config=configs/llama8b.py --topology=h100:1 --serve

Compiles the config's real step, kernels and parallel mode included, for devices that need not be
there, with nothing but abstract arrays: no weights, no data. Topologies are those of
lora_jax/planning/chips.py: TPUs (v4, v5e, v5p, v6e, tpu7x), h100:N, h200:N, cpu and cpu:N. All but
cpu need the compilers of requirements-aot.txt. A step that does not fit is an error.

--serve compiles the widest steps of the engine of lora_jax.serving instead, and says how many
requests of --length tokens, prompt and answer, run beside how many adapters of --rank on --targets;
without --requests, as many as fit. The base is in the config's format, and placed on devices by
config.parallel.mode.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout, installed or not
os.environ["JAX_PLATFORMS"] = "cpu"  # devices that are there have no part in it
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "16")  # as many as --topology=cpu:N may ask for

from absl import flags
from ml_collections import ConfigDict

from experiments.harness import budget, capacity, setup
from experiments.harness.main import launch
from experiments.harness.serving_ahead import Load

TOPOLOGY = flags.DEFINE_list(
    "topology", ["cpu"], "What to compile for; kinds of chip for --search=topology."
)
SEARCH = flags.DEFINE_enum(
    "search", None, ["topology", "batch"], "Finds the smallest machine, or the largest batch."
)
SERVE = flags.DEFINE_bool("serve", False, "Plan an engine that serves, not a step that trains.")
ADAPTERS = flags.DEFINE_list("adapters", ["8", "32", "128"], "How many are on the device at once.")
RANK = flags.DEFINE_integer("rank", Load.rank, "Of each adapter.")
TARGETS = flags.DEFINE_string("targets", Load.targets, "Of each adapter.")
LENGTH = flags.DEFINE_integer("length", Load.length, "Tokens of a request, prompt and answer.")
REQUESTS = flags.DEFINE_integer("requests", None, "At once; by default as many as fit.")
OF_SERVING = (ADAPTERS, RANK, TARGETS, LENGTH, REQUESTS)


def work(config: ConfigDict, workdir: Path) -> None:
    del workdir
    setup.require_filled(config)
    if not SERVE.value:
        if given := [flag.name for flag in OF_SERVING if flag.present]:
            raise ValueError(f"--{given[0]} is of a server: give --serve as well.")
        return budget.conduct(config, TOPOLOGY.value, SEARCH.value)
    if SEARCH.value:
        raise ValueError("--search is of a training step: leave it out beside --serve.")
    load = Load(rank=RANK.value, targets=TARGETS.value, length=LENGTH.value)
    capacity.conduct(config, TOPOLOGY.value, load, _counts(ADAPTERS.value), REQUESTS.value)


def _counts(given: list[str]) -> list[int]:
    if not all(count.isdecimal() for count in given):
        raise ValueError(f"--adapters={','.join(given)}: expected numbers, such as 8,32,128.")
    return [int(count) for count in given]


if __name__ == "__main__":
    launch("plan", work)
