"""The base that an adapter's file states, and whether it is this one."""

from collections.abc import Mapping
from pathlib import Path

import jax

from lora_jax.fingerprint import fingerprint, shape_fingerprint
from lora_jax.weights import PyTree

FORM, _FINGERPRINT = "lora_jax.base_form", "lora_jax.base_fingerprint"


def metadata_of(params: PyTree, known: str | None = None) -> dict[str, str]:
    """What tells the base again, if its weights are at hand or their fingerprint is known."""
    shapes_alone = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    if shapes_alone and known is None:
        return {}
    return {FORM: shape_fingerprint(params), _FINGERPRINT: known or fingerprint(params)}


def check(folder: Path, params: PyTree, metadata: Mapping[str, str]) -> None:
    """A base in other dtypes, or quantised, cannot be compared; one of the same form can.

    Raises:
      ValueError: for another base of the same form.
    """
    ours = metadata_of(params)
    comparable = ours and metadata.get(FORM) == ours[FORM]
    if comparable and metadata.get(_FINGERPRINT) != ours[_FINGERPRINT]:
        raise ValueError(
            f"{folder} was made for another base: its fingerprint is "
            f"{metadata.get(_FINGERPRINT)}, this one's {ours[_FINGERPRINT]}. Load the base that "
            "the adapter names; check_base=False takes this one, a rounding of it for example."
        )
