"""RoPE's base and scaling from a config.json, which has three places for them."""

from collections.abc import Mapping
from typing import Any

from lora_jax.models.config import RopeScaling
from lora_jax.models.config_json import Stated, positive, whole

_NESTED = ("rope_scaling", "rope_parameters")  # transformers takes the first that is not empty
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ALWAYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_KEYS = {"default": _ALWAYS, "llama3": _ALWAYS | {*_LLAMA3}}


def rope_of(stated: Stated) -> tuple[float, RopeScaling | None]:
    """Theta and scaling. Values that differ are refused: versions of transformers, and other
    programs, do not agree on which of them counts.

    Raises:
      ValueError: a contradiction, a scaling that is not supported, or a value of the wrong type.
    """
    nested = {key: _object(stated, key) for key in _NESTED if stated.get(key)}
    theta = _theta(stated, nested)
    settled = {key: _settle(stated, key, rope) for key, rope in nested.items()}
    if len(settled) == 2 and settled["rope_scaling"] != settled["rope_parameters"]:
        raise ValueError(
            f"{stated.path}: rope_scaling={nested['rope_scaling']!r} contradicts rope_parameters="
            f"{nested['rope_parameters']!r}; remove the wrong one."
        )
    return theta, next(iter(settled.values()), None)


def _object(stated: Stated, key: str) -> Mapping[str, Any]:
    rope = stated.get(key)
    if not isinstance(rope, dict):
        raise ValueError(
            f"{stated.path}: the RoPE scaling is {rope!r}, expected an object in {key}."
        )
    return rope


def _theta(stated: Stated, nested: Mapping[str, Mapping[str, Any]]) -> float:
    holders = {"config.json": stated.values, **nested}
    thetas = {
        where: float(positive(stated.path, values, "rope_theta"))
        for where, values in holders.items()
        if values.get("rope_theta") is not None
    }
    if len({*thetas.values()}) > 1:
        listed = ", ".join(f"{theta} in {where}" for where, theta in thetas.items())
        raise ValueError(f"{stated.path}: rope_theta contradicts itself: {listed}; keep one.")
    if "rope_parameters" in thetas and "rope_scaling" in nested and len(thetas) == 1:
        raise ValueError(
            f"{stated.path}: rope_theta stands in rope_parameters alone, and transformers reads "
            "rope_scaling where both are given; remove rope_scaling, or repeat rope_theta in it."
        )
    return next(iter(thetas.values()), 10_000.0)


def _settle(stated: Stated, where: str, rope: Mapping[str, Any]) -> RopeScaling | None:
    path = stated.path
    types = {rope[key] for key in ("rope_type", "type") if isinstance(rope.get(key), str)}
    if len(types) > 1:
        raise ValueError(
            f"{path}: {where} has both rope_type={rope['rope_type']!r} and type="
            f"{rope['type']!r}; keep one."
        )
    if not types and not rope.keys() <= {"rope_theta", "partial_rotary_factor"}:
        raise ValueError(
            f"{path}: {where}={dict(rope)!r} names no RoPE scaling by rope_type, and versions of "
            "transformers differ in what they make of it; add rope_type, or remove the rest."
        )
    kind = next(iter(types), "default")
    if kind not in _KEYS:
        raise ValueError(
            f"{path}: RoPE scaling {kind!r} is not supported; supported: 'default' and 'llama3'."
        )
    if unknown := rope.keys() - _KEYS[kind]:
        raise ValueError(
            f"{path}: unknown {', '.join(sorted(unknown))} in {where} of the RoPE scaling "
            f"{kind!r}; remove what it does not use."
        )
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(
            f"{path}: partial_rotary_factor={rope['partial_rotary_factor']!r} in {where} is not "
            "supported: RoPE turns all dimensions of a head."
        )
    return _llama3(stated, rope) if kind == "llama3" else None


def _llama3(stated: Stated, rope: Mapping[str, Any]) -> RopeScaling:
    path = stated.path
    if missing := [name for name in _LLAMA3 if name not in rope]:
        raise ValueError(f"{path}: the RoPE scaling 'llama3' lacks {', '.join(missing)}.")
    factor, low, high = (float(positive(path, rope, name)) for name in _LLAMA3[:3])
    original = whole(path, rope, _LLAMA3[3])
    if high <= low:
        raise ValueError(
            f"{path}: the RoPE scaling has high_freq_factor={high}, expected more than "
            f"low_freq_factor={low}."
        )
    outside = stated.get(_LLAMA3[3])
    if outside is not None and outside != original:
        raise ValueError(
            f"{path}: original_max_position_embeddings is {outside!r} beside a RoPE scaling that "
            f"has {original}; transformers takes the outer one, other programs the inner: keep one."
        )
    return RopeScaling(
        factor=factor, low_freq_factor=low, high_freq_factor=high, original_context=original
    )
