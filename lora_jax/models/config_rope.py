"""RoPE's base and scaling from a config.json, which has three places for them, and to one."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.models.config_json import Stated, positive, whole
from lora_jax.models.rope_scaling import (
    DynamicScaling,
    LinearScaling,
    LongRopeScaling,
    RopeScaling,
    Scaling,
    YarnScaling,
    longrope_amplitude,
    yarn_amplitude,
)

_NESTED = ("rope_scaling", "rope_parameters")  # transformers takes the first that is not empty
_ORIGINAL = "original_max_position_embeddings"
_PARTIAL = "partial_rotary_factor"
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL)
_ALWAYS = {"rope_type", "type", "rope_theta", _PARTIAL}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatedRope:
    """RoPE as a config.json states it; `fraction` is the part of each head that it turns."""

    theta: float
    scaling: Scaling | None
    fraction: float


def rope_of(
    stated: Stated, *, default_theta: float = 10_000.0, is_partial: bool = False
) -> StatedRope:
    """Theta, scaling and fraction. Values that differ are refused: versions of transformers, and
    other programs, do not agree on which of them counts. Only where it `is_partial` is a fraction
    below 1 supported.

    Raises:
      ValueError: a contradiction, a scaling that is not supported, or a value of the wrong type.
    """
    nested = {key: _object(stated, key) for key in _NESTED if stated.get(key)}
    theta = _theta(stated, nested, default_theta)
    settled = {key: _settle(stated, key, rope, is_partial) for key, rope in nested.items()}
    if len(settled) == 2 and settled["rope_scaling"] != settled["rope_parameters"]:
        raise ValueError(
            f"{stated.path}: rope_scaling={nested['rope_scaling']!r} contradicts rope_parameters="
            f"{nested['rope_parameters']!r}; remove the wrong one."
        )
    scaling = next(iter(settled.values()), None)
    return StatedRope(theta=theta, scaling=scaling, fraction=_fraction(stated, nested))


def context_of(stated: Stated, scaling: Scaling | None) -> int:
    """How many positions a model with this scaling reads: those of `max_position_embeddings`, which
    with a dynamic scaling, and often with YaRN, counts them before the stretch."""
    context = stated.count("max_position_embeddings")
    if isinstance(scaling, DynamicScaling | YarnScaling):
        return max(context, int(scaling.factor * scaling.original_context))
    return context


def written_rope(scaling: Scaling | None, context: int) -> dict[str, Any]:
    """The keys that hold a scaling, and the context beside it."""
    if scaling is None:
        return {"rope_scaling": None, "max_position_embeddings": context}
    values = {
        _ORIGINAL if name == "original_context" else name: (
            list(value) if isinstance(value, tuple) else value
        )
        for name, value in vars(scaling).items()
    }
    outside: dict[str, Any] = {"max_position_embeddings": context}
    if isinstance(scaling, DynamicScaling):
        outside["max_position_embeddings"] = values.pop(_ORIGINAL)
    if isinstance(scaling, LongRopeScaling):
        outside[_ORIGINAL] = scaling.original_context
    return {"rope_scaling": {"rope_type": scaling.rope_type, **values}, **outside}


def _object(stated: Stated, key: str) -> Mapping[str, Any]:
    rope = stated.get(key)
    if not isinstance(rope, dict):
        raise ValueError(
            f"{stated.path}: the RoPE scaling is {rope!r}, expected an object in {key}."
        )
    return rope


def _theta(stated: Stated, nested: Mapping[str, Mapping[str, Any]], default: float) -> float:
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
    return next(iter(thetas.values()), default)


def _fraction(stated: Stated, nested: Mapping[str, Mapping[str, Any]]) -> float:
    holders = {"config.json": stated.values, **nested}
    fractions = {
        where: float(positive(stated.path, values, _PARTIAL))
        for where, values in holders.items()
        if values.get(_PARTIAL) is not None
    }
    if len({*fractions.values()}) > 1:
        listed = ", ".join(f"{value} in {where}" for where, value in fractions.items())
        raise ValueError(f"{stated.path}: {_PARTIAL} contradicts itself: {listed}; keep one.")
    fraction = next(iter(fractions.values()), 1.0)
    if fraction > 1:
        raise ValueError(f"{stated.path}: {_PARTIAL} is {fraction}, expected at most 1.")
    return fraction


def _settle(
    stated: Stated, where: str, rope: Mapping[str, Any], is_partial: bool
) -> Scaling | None:
    path = stated.path
    types = {rope[key] for key in ("rope_type", "type") if isinstance(rope.get(key), str)}
    if len(types) > 1:
        raise ValueError(
            f"{path}: {where} has both rope_type={rope['rope_type']!r} and type="
            f"{rope['type']!r}; keep one."
        )
    if not types and not rope.keys() <= {"rope_theta", _PARTIAL}:
        raise ValueError(
            f"{path}: {where}={dict(rope)!r} names no RoPE scaling by rope_type, and versions of "
            "transformers differ in what they make of it; add rope_type, or remove the rest."
        )
    kind = next(iter(types), "default")
    if kind not in _READERS:
        supported = ", ".join(map(repr, _READERS))
        raise ValueError(f"{path}: RoPE scaling {kind!r} is not supported; supported: {supported}.")
    keys, read = _READERS[kind]
    given = {key: value for key, value in rope.items() if value is not None}
    if unknown := given.keys() - _ALWAYS - keys:
        raise ValueError(
            f"{path}: unknown {', '.join(sorted(unknown))} in {where} of the RoPE scaling "
            f"{kind!r}; remove what it does not use."
        )
    if not is_partial and rope.get(_PARTIAL) not in (None, 1):
        raise ValueError(
            f"{path}: partial_rotary_factor={rope[_PARTIAL]!r} in {where} is not "
            "supported: RoPE turns all dimensions of a head."
        )
    return read(stated, given)


def _default(stated: Stated, rope: Mapping[str, Any]) -> None:
    del stated, rope


def _llama3(stated: Stated, rope: Mapping[str, Any]) -> RopeScaling:
    path = stated.path
    _require(stated, "llama3", rope, *_LLAMA3)
    factor, low, high = (float(positive(path, rope, name)) for name in _LLAMA3[:3])
    if high <= low:
        raise ValueError(
            f"{path}: the RoPE scaling has high_freq_factor={high}, expected more than "
            f"low_freq_factor={low}."
        )
    return RopeScaling(
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=_original(stated, rope),
    )


def _linear(stated: Stated, rope: Mapping[str, Any]) -> LinearScaling:
    _require(stated, "linear", rope, "factor")
    return LinearScaling(factor=float(positive(stated.path, rope, "factor")))


def _dynamic(stated: Stated, rope: Mapping[str, Any]) -> DynamicScaling:
    _require(stated, "dynamic", rope, "factor")
    context = stated.count("max_position_embeddings")
    if _original(stated, rope) != context:
        raise ValueError(
            f"{stated.path}: {_ORIGINAL} is {_original(stated, rope)} beside a dynamic RoPE "
            f"scaling, which transformers counts from max_position_embeddings={context}; keep one."
        )
    return DynamicScaling(
        factor=float(positive(stated.path, rope, "factor")), original_context=context
    )


def _yarn(stated: Stated, rope: Mapping[str, Any]) -> YarnScaling:
    path = stated.path
    _require(stated, "yarn", rope, "factor")
    factor = float(positive(path, rope, "factor"))
    mscales = [float(positive(path, rope, key)) for key in _MSCALES if rope.get(key)]
    amplitude = yarn_amplitude(factor, *(mscales if len(mscales) == 2 else ()))
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ValueError(f"{path}: truncate is {truncate!r}, expected true or false.")
    return YarnScaling(
        factor=factor,
        original_context=_original(stated, rope),
        attention_factor=float(positive(path, rope, "attention_factor", amplitude)),
        beta_fast=float(positive(path, rope, "beta_fast", 32.0)),
        beta_slow=float(positive(path, rope, "beta_slow", 1.0)),
        truncate=truncate,
    )


def _longrope(stated: Stated, rope: Mapping[str, Any]) -> LongRopeScaling:
    path = stated.path
    _require(stated, "longrope", rope, "short_factor", "long_factor")
    original = _original(stated, rope)
    stretch = stated.count("max_position_embeddings") / original
    factor = float(positive(path, rope, "factor", stretch))
    amplitude = longrope_amplitude(factor, original)
    return LongRopeScaling(
        short_factor=_divisors(stated, rope, "short_factor"),
        long_factor=_divisors(stated, rope, "long_factor"),
        original_context=original,
        attention_factor=float(positive(path, rope, "attention_factor", amplitude)),
    )


def _require(stated: Stated, kind: str, rope: Mapping[str, Any], *names: str) -> None:
    if missing := [name for name in names if name not in rope]:
        raise ValueError(f"{stated.path}: the RoPE scaling {kind!r} lacks {', '.join(missing)}.")


def _original(stated: Stated, rope: Mapping[str, Any]) -> int:
    outside = stated.get(_ORIGINAL)
    default = stated.count("max_position_embeddings") if outside is None else outside
    original = whole(stated.path, rope, _ORIGINAL, default)
    if outside is not None and outside != original:
        raise ValueError(
            f"{stated.path}: original_max_position_embeddings is {outside!r} beside a RoPE scaling "
            f"that has {original}; transformers takes the outer one, other programs the inner: "
            "keep one."
        )
    return original


def _divisors(stated: Stated, rope: Mapping[str, Any], key: str) -> tuple[float, ...]:
    values = rope[key]
    if not isinstance(values, list):
        raise ValueError(f"{stated.path}: {key} is {values!r}, expected a list of numbers.")
    return tuple(float(positive(stated.path, {key: value}, key)) for value in values)


_MSCALES = ("mscale", "mscale_all_dim")
_YARN = {"factor", _ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "truncate", *_MSCALES}
_READERS: dict[str, tuple[set[str], Callable[[Stated, Mapping[str, Any]], Scaling | None]]] = {
    "default": (set(), _default),
    RopeScaling.rope_type: (set(_LLAMA3), _llama3),
    LinearScaling.rope_type: ({"factor"}, _linear),
    DynamicScaling.rope_type: ({"factor", _ORIGINAL}, _dynamic),
    YarnScaling.rope_type: (_YARN, _yarn),
    LongRopeScaling.rope_type: (
        {"factor", _ORIGINAL, "attention_factor", "short_factor", "long_factor"},
        _longrope,
    ),
}
