"""Each arm's adapter, as a folder that PEFT loads, and what `verify` says of it."""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.harness.outcome import Outcome
from lora_jax.interop import Digest, ModelForward, Pretrained, digest_of, peft, verify
from lora_jax.interop.digest import can_run
from lora_jax.interop.writing import appearing
from lora_jax.parallel import hosts
from lora_jax.training import records
from lora_jax.transform import Delta

Log = Callable[[dict[str, Any]], None]
REPORTS = "verify.json"  # beside the adapters' folder


def save(
    config: ConfigDict,
    model: Pretrained,
    outcomes: Sequence[Outcome],
    folder: Path,
    base_fingerprint: str,
    log: Log,
) -> None:
    """Writes what is not there yet and PEFT has a form for, and verifies what is there; `log` hears
    of it, and of what has no form."""
    wanted = [o for o in outcomes if o.arm.in_peft and not o.diverged]
    deltas = [hosts.gathered(outcome.delta) for outcome in wanted]
    there = hosts.exchange([(folder / o.arm.folder).exists() for o in wanted])[0]
    digests = [
        None if exists else _digest(model, outcome, delta, log)
        for exists, outcome, delta in zip(there, wanted, deltas, strict=True)
    ]

    def write_one(outcome: Outcome, delta: Delta, digest: Digest | None, target: Path) -> None:
        card = peft.model_card(
            model.params,
            delta,
            base_name=model.name,
            data=config.data.path or config.data.source,
            command=shlex.join(["python", *sys.argv]),
            validation_loss=outcome.progress.val_loss,
        )
        with appearing(target) as partial:
            peft.save_adapter(
                partial,
                delta,
                model.params,
                peft.model_names(model.config),
                base_name=model.name,
                num_kv_heads=model.config.num_kv_heads,
                card=card,
                base_fingerprint=base_fingerprint,
                digest=digest,
            )

    def write() -> None:
        for outcome, delta, digest in zip(wanted, deltas, digests, strict=True):
            target = folder / outcome.arm.folder
            if target.exists():
                continue
            try:
                write_one(outcome, delta, digest, target)
            except ValueError as error:  # with everything trained, no reason to end
                log({"event": "no adapter", "arm": outcome.arm.name, "why": str(error)})

    hosts.on_first(write)
    written = hosts.exchange([(folder / o.arm.folder).exists() for o in wanted])[0]
    kept = [pair for pair, exists in zip(zip(wanted, deltas, strict=True), written, strict=True)
            if exists]  # fmt: skip
    told = {o.arm.folder: _verified(model, o, delta, folder, log) for o, delta in kept}
    hosts.on_first(lambda: _report(folder.parent / REPORTS, told))


def _report(path: Path, told: dict[str, Any]) -> None:
    """Adds to what is there of other arms."""
    before = json.loads(path.read_text()) if path.exists() else {}
    records.write_json(path, {**before, **told})


def _digest(model: Pretrained, outcome: Outcome, delta: Delta, log: Log) -> Digest | None:
    """Computed by all processes together, where the base is sharded over them."""
    try:
        return digest_of(ModelForward(model.config), model.params, delta)
    except ValueError as error:
        log({"event": "unverified", "arm": outcome.arm.name, "why": str(error)})
        return None


def _verified(
    model: Pretrained, outcome: Outcome, delta: Delta, folder: Path, log: Log
) -> dict[str, Any]:
    """The report of the files; where the base is sharded over several processes, which cannot read
    them so, that of the delta."""
    name = outcome.arm.name
    adapter = folder / outcome.arm.folder if can_run(model.params) else delta
    try:
        report = verify(
            adapter, model.params, peft.model_names(model.config), forms=(), check_base=False
        )
    except (ValueError, FileNotFoundError) as error:
        log({"event": "unverified", "arm": name, "why": str(error)})
        return {"ok": False, "error": str(error)}
    findings = [f"{found.level}: {found.text}" for found in report.findings]
    log({"event": "verified", "arm": name, "what": report.summary(), "findings": findings})
    return report.to_dict()
