"""Each arm's adapter, as a folder that PEFT loads."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from lora_jax.interop import Pretrained, peft

if TYPE_CHECKING:
    from experiments.harness.run import Outcome


def save(
    config: ConfigDict, model: Pretrained, outcomes: Sequence["Outcome"], folder: Path
) -> None:
    """Writes what is not there yet and PEFT has a form for."""
    names = peft.llama_names(model.config)
    for outcome in outcomes:
        target = folder / re.sub(r"[^\w.-]+", "_", outcome.arm.name)
        if not outcome.arm.in_peft or target.exists():
            continue
        card = peft.model_card(
            model.params,
            outcome.delta,
            base_name=model.name,
            data=config.data.source,
            command=shlex.join(["python", *sys.argv]),
            validation_loss=outcome.progress.val_loss,
        )
        peft.save_adapter(
            target,
            outcome.delta,
            model.params,
            names,
            base_name=model.name,
            num_kv_heads=model.config.num_kv_heads,
            card=card,
        )
