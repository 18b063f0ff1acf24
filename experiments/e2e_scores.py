"""How good are the texts? BLEU, NIST, METEOR, ROUGE-L and CIDEr of saved arms on E2E's test split.

Greedy answers to the distinct meaning representations, against all references of each, by the
official scorer's definitions (experiments/scores). Nothing is trained; --config, or --budget, is
that of their runs. Every arm is a line of scores.jsonl, and is not answered again.

    python experiments/e2e_scores.py --budget=cpu --config.data.path=E2E --runs=RUN
    python experiments/e2e_scores.py --budget=cpu --config.data.path=E2E --runs=RUN --meanings=105
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout, installed or not

from experiments import scores
from experiments.harness import saved_arms, setup
from experiments.harness.main import launch
from experiments.harness.progress import console
from experiments.harness.report import environment, table
from experiments.harness.workdir import prepare
from experiments.scores import generated
from lora_jax import data
from lora_jax.data.e2e import SYSTEM
from lora_jax.interop import Pretrained
from lora_jax.tables import aligned
from lora_jax.training import records

MEANINGS = flags.DEFINE_integer(
    "meanings", 0, "So many meaning representations, evenly spaced; 0: all.", lower_bound=0
)
BASE = "untuned base"


def work(config: ConfigDict, workdir: Path) -> None:
    if jax.process_count() > 1:
        raise ValueError("this scores in one process: start it without --distributed.")
    if config.data.source != "e2e":
        raise ValueError(
            f"config.data.source={config.data.source!r}: expected e2e, whose test split has "
            "several references each. Give --budget or the settings of the arms' run."
        )
    arms = saved_arms.saved_arms(
        [Path(run) for run in saved_arms.RUNS.value], saved_arms.ARMS.value
    )
    flagged = {"meanings": MEANINGS.value}
    prepare("e2e_scores", ConfigDict({**config.to_dict(), "e2e_scores": flagged}), workdir)
    console.print(f"[bold]Scores[/bold] of {len(arms)} arms, records in {workdir}")
    items = sampled(generated.grouped(setup.records(config, "test")), MEANINGS.value)
    known = {row["arm"]: row for row in records.read(workdir / "scores.jsonl")}
    names = [BASE, *(arm.name for arm in arms)]
    wanted = [name for name in names if name not in known]
    if wanted:
        model = setup.load_model(config)
        prompts = prompts_of(model, items.meanings)
        by_name = {arm.name: arm for arm in arms}
        for name in wanted:
            delta = by_name[name].load(model) if name in by_name else {}
            said = generated.answers(model, delta, prompts)
            row = {"arm": name, **facts(by_name.get(name)), "answers": said}
            try:
                row["scores"] = scores.scores(said, items.references)
            except ValueError as error:  # an arm that answers nothing costs the others nothing
                row |= {"scores": {}, "why": str(error)}
            known[name] = row
            records.append(workdir / "scores.jsonl", row)
            console.print(f"{name}: {in_words(row)}", markup=False)
    write(workdir, [known[name] for name in names], len(items.meanings))


def sampled(items: generated.Items, count: int) -> generated.Items:
    """So many of the items, evenly spaced; all for 0."""
    total = len(items.meanings)
    if not 0 < count < total:
        return items
    kept = [i * total // count for i in range(count)]
    return generated.Items([items.meanings[i] for i in kept], [items.references[i] for i in kept])


def prompts_of(model: Pretrained, meanings: Sequence[str]) -> list[str]:
    """As the arms' training had them."""
    return [
        data.render_messages(
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": meaning}],
            model.tokenizer,
            add_generation_prompt=True,
        )
        for meaning in meanings
    ]


def facts(arm: saved_arms.SavedArm | None) -> dict[str, Any]:
    if arm is None:
        return {}
    return {"rank": arm.rank, "learning_rate": arm.learning_rate, "seed": arm.seed,
            "val_loss": arm.val_loss}  # fmt: skip


def in_words(row: dict[str, Any]) -> str:
    if not row["scores"]:
        return row["why"]
    return ", ".join(f"{name} {value:.4f}" for name, value in row["scores"].items())


def write(workdir: Path, rows: Sequence[dict[str, Any]], count: int) -> None:
    """`results.json` and `results.md`, without the answers, which `scores.jsonl` has."""
    names = [name for name in scores.NAMES if any(name in row["scores"] for row in rows)]
    header = ("arm", "validation loss", *names)
    cells = [
        (
            row["arm"],
            "" if row.get("val_loss") is None else f"{row['val_loss']:.4f}",
            *(f"{row['scores'][name]:.4f}" if name in row["scores"] else "-" for name in names),
        )
        for row in rows
    ]
    command = shlex.join(["python", *sys.argv])
    kept = [{key: value for key, value in row.items() if key != "answers"} for row in rows]
    records.write_json(
        workdir / "results.json",
        {"command": command, "meanings": count, "missing": scores.missing(), "arms": kept,
         "environment": environment()},
    )  # fmt: skip
    note = f"Greedy answers to {count} meaning representations of E2E's test split, all references."
    lines = ["# E2E scores", "", f"`{command}`", "", *table(header, cells), "", note]
    lines += [f"{name} is left out: {why}" for name, why in scores.missing().items()]
    (workdir / "results.md").write_text("\n".join([*lines, ""]))
    console.print(f"\n{aligned([header, *cells])}\n\n{note}", markup=False)


if __name__ == "__main__":
    launch("e2e_scores", work)
