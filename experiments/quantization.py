"""Which four bits? NF4, FP4 and Int4, as table 2 of QLoRA asks (Dettmers et al. 2023).

Error on normal weights and on the model's, and the model's perplexity, without any tuning. The
model is turned into a random basis first (lora_jax/models/rotation.py): its file's own numbers may
sit on a 4-bit grid already, as the default model's do.

    python experiments/quantization.py
"""

import shlex
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout, installed or not

from experiments.harness import formats, pictures
from experiments.harness.main import launch
from experiments.harness.workdir import prepare

FORMATS = {
    "exact": {},
    "int8": {"format": "int8", "double_quant": False},
    "nf4": {"format": "nf4", "double_quant": False},
    "nf4, double": {"format": "nf4", "double_quant": True},
    "fp4 (e2m1)": {"format": "e2m1", "double_quant": False},
    "int4": {"format": "int4", "double_quant": False},
    "fp4 (bitsandbytes)": {"format": "fp4", "double_quant": False},
}


def work(config: ConfigDict, workdir: Path) -> None:
    if jax.process_count() > 1:
        raise ValueError("this comparison runs in one process: start it without --distributed.")
    prepare("quantization", config, workdir)
    results = formats.compare(config, FORMATS, workdir)
    title, command = f"Quantisation, {config.name}", shlex.join(["python", *sys.argv])
    results = formats.write(workdir, title, command, results)
    pictures.loss_by_format(workdir / "quantization.png", results)


if __name__ == "__main__":
    launch("quantization", work)
