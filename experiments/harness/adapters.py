"""Each arm's adapter, as a folder that PEFT loads."""

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.harness.outcome import Outcome
from lora_jax.interop import Pretrained, peft
from lora_jax.interop.writing import appearing
from lora_jax.parallel import hosts
from lora_jax.transform import Delta


def save(
    config: ConfigDict,
    model: Pretrained,
    outcomes: Sequence[Outcome],
    folder: Path,
    base_fingerprint: str,
    log: Callable[[dict[str, Any]], None],
) -> None:
    """Writes what is not there yet and PEFT has a form for; `log` hears of what it has none for."""
    wanted = [o for o in outcomes if o.arm.in_peft and not o.diverged]
    deltas = [hosts.whole(outcome.delta) for outcome in wanted]

    def write_one(outcome: Outcome, delta: Delta, target: Path) -> None:
        card = peft.model_card(
            model.params,
            delta,
            base_name=model.name,
            data=config.data.source,
            command=shlex.join(["python", *sys.argv]),
            validation_loss=outcome.progress.val_loss,
        )
        with appearing(target) as partial:
            peft.save_adapter(
                partial,
                delta,
                model.params,
                peft.llama_names(model.config),
                base_name=model.name,
                num_kv_heads=model.config.num_kv_heads,
                card=card,
                base_fingerprint=base_fingerprint,
            )

    def write() -> None:
        for outcome, delta in zip(wanted, deltas, strict=True):
            target = folder / outcome.arm.folder
            if target.exists():
                continue
            try:
                write_one(outcome, delta, target)
            except ValueError as error:  # with everything trained, no reason to end
                log({"event": "no adapter", "arm": outcome.arm.name, "why": str(error)})

    hosts.on_first(write)
