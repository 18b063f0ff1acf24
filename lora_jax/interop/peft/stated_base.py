"""The fingerprint of its base in an adapter's file, and whether it is that of this base."""

from collections.abc import Mapping
from pathlib import Path

import jax

from lora_jax.fingerprint import fingerprint, shape_fingerprint
from lora_jax.weights import PyTree

SHAPES, _FINGERPRINT = "lora_jax.base_form", "lora_jax.base_fingerprint"


def metadata_of(params: PyTree, known: str | None = None) -> dict[str, str]:
    """The base's fingerprints, if its weights are given or their fingerprint is known."""
    shapes_alone = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    if shapes_alone and known is None:
        return {}
    return {SHAPES: shape_fingerprint(params), _FINGERPRINT: known or fingerprint(params)}


def check(folder: Path, params: PyTree, metadata: Mapping[str, str]) -> None:
    """Compares the base, if its paths, shapes and dtypes are those of the file's.

    Raises:
      ValueError: for a base of the same shapes and dtypes with other weights.
    """
    ours = metadata_of(params)
    comparable = ours and metadata.get(SHAPES) == ours[SHAPES]
    if comparable and metadata.get(_FINGERPRINT) != ours[_FINGERPRINT]:
        raise ValueError(
            f"{folder} was made for another base: its fingerprint is "
            f"{metadata.get(_FINGERPRINT)}, this one's {ours[_FINGERPRINT]}. Load the base that "
            "the adapter names; check_base=False takes this one, a rounding of it for example."
        )
