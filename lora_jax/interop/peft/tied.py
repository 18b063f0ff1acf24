"""Adapters of models whose output head is the embedding table itself.

PEFT adapts the two separately, and copies a table of modules_to_save, unless the adapter states
`ensure_weight_tying`: then it saves both, and the head's factors are the table's, transposed.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.interop.peft.config import pattern_values
from lora_jax.interop.peft.model import Model, Tensors
from lora_jax.interop.peft.names import HEAD, TABLE
from lora_jax.interop.peft.targeted import saved

PAIR = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"}
ROWS = "token_adapter.trainable_tokens_delta"


def without_head(config: Mapping[str, Any], tensors: Tensors, model: Model) -> Tensors:
    """The tensors of a tied base's adapter without the head's, which must follow the table's.

    Raises:
      ValueError: where one of the two changes without the other.
    """
    if not model.is_tied:
        return tensors
    table = next(slot.module for slot in model.slots.values() if slot.is_embedding)
    heads = {name for name in tensors if HEAD in name.split(".")}
    head = {name.partition(f"{HEAD}.")[2]: tensors[name] for name in heads}
    own = {
        name.removeprefix(f"{table}."): value
        for name, value in tensors.items()
        if name.startswith(f"{table}.")
    }
    alone = set(head) - {"weight", *PAIR}
    if "weight" in head and not _equal(head["weight"], own.get("weight")):
        alone.add("weight")
    if head.keys() & set(PAIR) and not _follows(config, head, own, table, model):
        alone |= set(PAIR)
    if alone:
        raise _apart(model, HEAD)
    # A table outside modules_to_save is the base's own to PEFT, and its head follows it.
    copied = "weight" in own and any(
        table in modules for modules in saved(model.source, config, [table]).values()
    )
    if (copied and "weight" not in head) or (
        "lora_embedding_A" in own and not set(PAIR) & set(head)
    ):
        raise _apart(model, TABLE)
    return {name: value for name, value in tensors.items() if name not in heads}


def refuse_rows_of_one(model: Model) -> None:
    """In PEFT, trained rows of a tied table change the head too; an untied copy does not follow.

    Raises:
      ValueError: where the head equals the table.
    """
    at = {slot.suffix: slot.path for slot in model.slots.values() if slot.suffix in (HEAD, TABLE)}
    if len(at) == 2 and np.array_equal(model.value(at[HEAD]), model.value(at[TABLE])):
        raise ValueError(
            f"{model.source}: its trained rows are those of {TABLE} alone, and {HEAD} of this base "
            "is a copy of it. In PEFT the head of a tied base follows these rows: load the adapter "
            "over the tied base."
        )


def _follows(config, head: Tensors, own: Tensors, table: str, model: Model) -> bool:
    pairs = all(
        theirs in head and _equal(head[theirs].T, own.get(ours)) for theirs, ours in PAIR.items()
    )
    alphas = pattern_values(model.source, config, "alpha_pattern", [table, HEAD], None)
    return pairs and not config.get("use_dora") and alphas[table] == alphas[HEAD]


def _equal(one: np.ndarray, other: np.ndarray | None) -> bool:
    return other is not None and np.array_equal(one, other)


def _apart(model: Model, which: str) -> ValueError:
    return ValueError(
        f"{model.source} changes {which} alone, but in this base the output head is the embedding "
        "table itself, and one cannot change without the other. Untie them: params, config = "
        "models.untie(params, config), and names = model_names(config). Where the model has a head "
        f'of its own, add it to names as "{HEAD}".'
    )
