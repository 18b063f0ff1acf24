"""Each arm's adapter, as a folder that PEFT loads."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from lora_jax.interop import Pretrained, peft
from lora_jax.parallel import hosts

if TYPE_CHECKING:
    from experiments.harness.run import Outcome


def save(
    config: ConfigDict,
    model: Pretrained,
    outcomes: Sequence["Outcome"],
    folder: Path,
    base_fingerprint: str,
) -> None:
    """Writes what is not there yet and PEFT has a form for."""
    deltas = [hosts.whole(outcome.delta) if outcome.arm.in_peft else None for outcome in outcomes]

    def write() -> None:
        for outcome, delta in zip(outcomes, deltas, strict=True):
            target = folder / re.sub(r"[^\w.-]+", "_", outcome.arm.name)
            if delta is None or target.exists():
                continue
            card = peft.model_card(
                model.params,
                delta,
                base_name=model.name,
                data=config.data.source,
                command=shlex.join(["python", *sys.argv]),
                validation_loss=outcome.progress.val_loss,
            )
            peft.save_adapter(
                target,
                delta,
                model.params,
                peft.llama_names(model.config),
                base_name=model.name,
                num_kv_heads=model.config.num_kv_heads,
                card=card,
                base_fingerprint=base_fingerprint,
            )

    hosts.on_first(write)
