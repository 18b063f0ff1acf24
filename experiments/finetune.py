"""One adapter from a file of chats.

A line of the file is {"messages": [{"role": ..., "content": ...}, ...]}, or {"prompt": ...,
"response": ...}. What kind of task that is, is shown before training starts, and --plan ends there.
The settings and their reasons are in configs/finetune.py.

    python experiments/finetune.py --config.data.path=chats.jsonl
    python experiments/finetune.py --config.data.path=chats.jsonl --plan
    python experiments/finetune.py --config.data.path=chats.jsonl --config.train.epochs=2
    python experiments/finetune.py --config.data.path=chats.jsonl --config.model.source=FOLDER
    python experiments/finetune.py --config.data.path=chats.jsonl --config.base.quantize=nf4
"""

import functools
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout, installed or not

from experiments.harness import pictures, task_report
from experiments.harness.main import conduct, launch
from experiments.harness.progress import console
from experiments.harness.shared import prepared
from experiments.harness.task import settled


def finetune(config: ConfigDict, workdir: Path, *, plan_only: bool = False) -> None:
    """Shows the task, trains, and says what comes next."""
    task = settled(config)
    console.print(task_report.in_words(task), markup=False)
    if plan_only:
        return
    results = conduct(
        "finetune",
        "Fine-tuning",
        task.config,
        [task.arm],
        workdir,
        pictures.loss_by_step,
        load=functools.partial(prepared, given=task.examples),
    )
    console.print(f"\n{task_report.next_commands(task, workdir, results)}", markup=False)


if __name__ == "__main__":
    launch(
        "finetune",
        lambda config, workdir: finetune(config, workdir, plan_only=flags.FLAGS.plan),
        plans=True,
        config_file="finetune",
    )
