"""Which method? All of them on one model, the same budgets and the same batches.

A budget is what LoRA trains at one of `config.methods.ranks` on all linear layers. A method that
has a size (a rank, a width) gets the one that comes nearest to it in trainable parameters: LoRA-FA,
which trains B alone, about twice the rank. VeRA, IA3, prompts and prefixes are small by design and
keep sizes of their own; Full trains everything. Each runs at its own best learning rate and over
seeds, by the rules of `harness/study/search.py`.

    python experiments/methods.py
    python experiments/methods.py --config.methods.names="('LoRA', 'DoRA')"
    python experiments/methods.py --budget=cpu --config.data.path=E2E
"""

import sys
from pathlib import Path

from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout, installed or not

import lora_jax as lora
from experiments.harness import comparison
from experiments.harness.comparison import MethodArms
from experiments.harness.main import main
from experiments.harness.study import pictures
from experiments.harness.study.study import Study


def method_arms(config: ConfigDict) -> dict[str, MethodArms]:
    """Every method with the learning rate from which the search for its best starts."""
    steps = config.train.steps
    houlsby = "o_proj", "down_proj"
    ia3 = {"k_proj|v_proj": lora.IA3(), "down_proj": lora.IA3(scales="input")}

    def adalora(rank):
        target = max(1, 2 * rank // 3)
        return lora.AdaLoRA(
            rank=rank, target_rank=target, total_steps=steps, final=steps // 4, alpha=16.0
        )

    return {
        "LoRA": MethodArms(lambda r: lora.LoRA(rank=r), rate=3e-3),
        "rsLoRA": MethodArms(lambda r: lora.LoRA(rank=r, scaling="rslora"), rate=2e-3),
        "LoRA+": MethodArms(lambda r: lora.LoRA(rank=r), rate=1e-3, b_ratio=16.0),
        "LoRA-FA": MethodArms(
            lambda r: lora.LoRA(rank=r, train_a=False), rate=3e-3, project_b=True
        ),
        "PiSSA": MethodArms(lambda r: lora.LoRA(rank=r, init="pissa_niter_4"), rate=1e-3),
        "OLoRA": MethodArms(lambda r: lora.LoRA(rank=r, init="olora"), rate=1e-3),
        "DoRA": MethodArms(lambda r: lora.DoRA(rank=r), rate=3e-3),
        "AdaLoRA": MethodArms(adalora, rate=2e-2),
        "Bottleneck": MethodArms(
            lambda m: lora.Bottleneck(size=m), rate=3e-3, targets=houlsby, in_peft=False
        ),
        "VeRA": MethodArms(lora.VeRA(), rate=1e-1),
        "IA3": MethodArms(ia3, rate=4e-2),
        "Prompt": MethodArms(lora.Prompt(), rate=5e-2, targets="embed"),
        "Prefix": MethodArms(lora.Prefix(), rate=5e-2, targets="k_proj"),
        "Full": MethodArms(lora.Full(), rate=2e-4, targets=".*", in_peft=False),
    }


STUDY = Study(
    cells=lambda config: comparison.method_cells(config, method_arms(config)),
    draw=pictures.loss_by_method,
    completed=comparison.with_costs,
    sized=True,
)

if __name__ == "__main__":
    main("methods", "Methods", STUDY)
