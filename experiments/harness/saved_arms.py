"""The arms that other experiments saved: adapters of PEFT's format, and full updates."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments.harness import full_updates
from lora_jax.interop import Pretrained, peft
from lora_jax.interop.peft.folder import CONFIG
from lora_jax.transform import Delta

RUNS = flags.DEFINE_list("runs", [], "Folders of runs or of adapters, by commas.")
ARMS = flags.DEFINE_string("arms", "", "A regular expression that the arms' names must hold.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedArm:
    """One of them, with what its run's record says of it.

    Attributes:
      name: as in that record; by its folder where there is none.
      source: the adapter's folder, or the file of a full update.
      rank: None for full fine-tuning, and for methods without one.
      learning_rate, seed, val_loss: None where no record says.
    """

    name: str
    source: Path
    rank: int | None
    learning_rate: float | None = None
    seed: int | None = None
    val_loss: float | None = None

    @property
    def is_full(self) -> bool:
        return self.source.suffix == full_updates.SUFFIX

    @property
    def order(self) -> float:
        """By which the best comes first; one without a record last."""
        return float("inf") if self.val_loss is None else self.val_loss

    def load(self, model: Pretrained) -> Delta:
        if self.is_full:
            return full_updates.load(self.source, model.params)
        return peft.load_adapter(self.source, model.params, peft.model_names(model.config))


def saved_arms(folders: Sequence[Path], only: str) -> list[SavedArm]:
    """The arms of these folders of runs, or of adapters, whose names `only` finds.

    Raises:
      ValueError: for a folder that holds none, a pattern that is none or matches none, or two arms
        of one name.
    """
    if not folders:
        raise ValueError("there is nothing to compare: expected --runs=FOLDER, several by commas.")
    try:
        pattern = re.compile(only)
    except re.error as error:
        raise ValueError(f"--arms={only!r} is not a regular expression: {error}.") from None
    every = [arm for folder in folders for arm in _of(folder)]
    arms = [arm for arm in every if pattern.search(arm.name)]
    if not arms:
        raise ValueError(f"--arms={only!r} matches none of {', '.join(arm.name for arm in every)}.")
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            places = ", ".join(str(arm.source) for arm in arms if arm.name == name)
            raise ValueError(f"several arms are named {name!r}: {places}. Choose by --arms.")
    return arms


def _of(folder: Path) -> list[SavedArm]:
    if (folder / CONFIG).is_file():
        return [_adapter(folder, {})]
    rows = _rows(folder / "results.json")
    adapters = sorted(path.parent for path in folder.glob(f"adapters/*/{CONFIG}"))
    updates = sorted(folder.glob(f"{full_updates.FOLDER}/*{full_updates.SUFFIX}"))
    if not adapters and not updates:
        raise ValueError(
            f"{folder} holds no {CONFIG}, no adapters/ and no {full_updates.FOLDER}/: expected the "
            "folder of an adapter, or of a run that has ended."
        )
    found = [_adapter(path, rows.get(path.name, {})) for path in adapters]
    return found + [
        SavedArm(source=path, rank=None, **_recorded(path.stem, rows.get(path.stem, {})))
        for path in updates
    ]


def _adapter(folder: Path, row: Mapping[str, Any]) -> SavedArm:
    config = json.loads((folder / CONFIG).read_text())
    rank = row.get("rank", config.get("r") if config.get("peft_type") == "LORA" else None)
    return SavedArm(source=folder, rank=rank, **_recorded(folder.name, row))


def _recorded(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("learning_rate", "seed", "val_loss")
    return {"name": row.get("name", name), **{key: row.get(key) for key in keys}}


def _rows(path: Path) -> dict[str, Mapping[str, Any]]:
    """The arms of a record by the names of their folders, as `Arm.folder` makes them."""
    if not path.is_file():
        return {}
    arms = json.loads(path.read_text()).get("arms", [])
    return {re.sub(r"[^\w.+-]+", "_", arm["name"]): arm for arm in arms}
