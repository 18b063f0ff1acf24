"""What do updates have in common, and what do they add? Sections 7.2 and 7.3 of LoRA (Hu et al.
2021), intruder dimensions (arXiv:2410.21228), and the rank of full tuning (arXiv:2405.09673).

Of arms that other experiments saved; nothing is trained. --config is the one of their runs.

    python experiments/subspaces.py --runs=runs/rank_sweep-smollm2_135m-59b499
    python experiments/subspaces.py --runs=RUN,OTHER --arms="r8|r64|full" --text=wikitext2/valid.txt
    python experiments/subspaces.py --runs=RUN --targets=all-linear   # repairs these alone
    python experiments/subspaces.py --runs=RUN --factors= --ranks=4,16   # repairs none
"""

import shlex
import sys
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout, installed or not

from experiments.harness import saved_arms, setup, subspace_pictures, subspace_report, subspaces
from experiments.harness.main import launch
from experiments.harness.progress import console
from experiments.harness.text_losses import losses_of
from experiments.harness.workdir import prepare

TARGETS = flags.DEFINE_string("targets", "qv", "A preset or a regular expression of paths.")
RANKS = flags.DEFINE_list("ranks", ["8", "64"], "Whose directions are compared.")
TOP = flags.DEFINE_integer("top", 10, "Leading directions that may be intruders.", lower_bound=1)
THRESHOLD = flags.DEFINE_float("threshold", 0.5, "The cosine below which one is an intruder.")
FACTORS = flags.DEFINE_list("factors", ["0.9", "0.7", "0.5", "0"], "To scale intruders by.")
TEXT = flags.DEFINE_string("text", None, "Another text, whose loss says what was forgotten.")


def settings() -> subspaces.Settings:
    try:
        ranks, factors = tuple(map(int, RANKS.value)), tuple(map(float, FACTORS.value))
    except ValueError as error:
        raise ValueError(f"--ranks and --factors take numbers by commas: {error}.") from None
    if len(ranks) != 2:
        raise ValueError(f"--ranks={','.join(RANKS.value)}: expected two, such as 8,64.")
    return subspaces.Settings(
        targets=TARGETS.value,
        ranks=ranks,
        top=TOP.value,
        threshold=THRESHOLD.value,
        factors=factors,
    )


def work(config: ConfigDict, workdir: Path) -> None:
    if jax.process_count() > 1:
        raise ValueError("this comparison runs in one process: start it without --distributed.")
    chosen = settings()
    arms = saved_arms.saved_arms(
        [Path(run) for run in saved_arms.RUNS.value], saved_arms.ARMS.value
    )
    text = None if TEXT.value is None else Path(TEXT.value).expanduser()
    flagged = {
        "runs": saved_arms.RUNS.value,
        "arms": saved_arms.ARMS.value,
        "text": TEXT.value or "",
        **vars(chosen),
    }
    prepare("subspaces", ConfigDict({**config.to_dict(), "subspaces": flagged}), workdir)
    console.print(f"[bold]Subspaces[/bold] of {len(arms)} arms, records in {workdir}")
    model = setup.load_model(config)
    losses = losses_of(config, model, text)
    results = subspaces.study(model, arms, chosen, losses, console.print)
    title, command = f"Subspaces, {config.name}", shlex.join(["python", *sys.argv])
    results = subspace_report.write(workdir, title, command, results)
    subspace_pictures.draw(workdir / "subspaces.png", results)


if __name__ == "__main__":
    launch("subspaces", work)
