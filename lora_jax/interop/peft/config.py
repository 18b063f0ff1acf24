"""adapter_config.json: what PEFT says of an adapter beside its tensors."""

import collections
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_jax.interop.peft.patterns import matching

# Options of PEFT that change what an adapter computes, and that our methods do not have.
_UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication",
    "megatron_config", "monteclora_config", "target_parameters", "use_bdlora", "use_qalora",
    "velora_config",
)  # fmt: skip
# Starts that move a part of the base into the factors: the adapter fits that other base alone.
_MOVES_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


_NUMBERS = (
    "lora_alpha", "lora_dropout", "vera_dropout", "d_initial", "beta1", "beta2", "orth_reg_weight"
)  # fmt: skip
_COUNTS = ("r", "init_r", "target_r", "total_step", "tinit", "tfinal", "deltaT")
_PATTERNS = ("rank_pattern", "alpha_pattern")
_SWITCHES = ("use_dora", "use_rslora", "lora_bias", "ensure_weight_tying")
_BIASES = ("none", "all", "lora_only", "vera_only")
_LARGEST = 1 << 31


def check_values(source: str, config: Mapping[str, Any]) -> None:
    """Raises ValueError for a value that is not of the kind, or the size, that its field takes."""

    def refuse(field: str, expected: str):
        raise ValueError(f"{source}: {field} is {config[field]!r:.200}, expected {expected}.")

    for field in _NUMBERS:
        if config.get(field) is not None and not _is_number(config[field]):
            refuse(field, "a number")
    for field in _COUNTS:
        value = config.get(field)
        if value is not None and not (_is_number(value) and isinstance(value, int) and value >= 0):
            refuse(field, "a count")
    for field in _PATTERNS if config.get("peft_type") == "LORA" else ():
        found = config.get(field)
        if found and not (isinstance(found, dict) and all(map(_is_number, found.values()))):
            refuse(field, "an object of numbers")
    if config.get("peft_type") == "ADALORA" and config.get("rank_pattern"):
        found = config["rank_pattern"]
        if not isinstance(found, dict) or not all(map(_is_mask, found.values())):
            refuse("rank_pattern", "an object of lists of booleans")
    for field in _SWITCHES:
        if not isinstance(config.get(field, False), bool | None):
            refuse(field, "true or false")
    if config.get("bias", "none") not in _BIASES:
        refuse("bias", f"one of {', '.join(_BIASES)}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_LARGEST < value < _LARGEST


def _is_mask(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(kept, bool) for kept in value)


def check_supported(source: str, config: Mapping[str, Any]) -> None:
    """Raises ValueError for what our methods do not have."""
    if odd := [f"{key}={config[key]!r}" for key in _UNSUPPORTED if config.get(key)]:
        raise ValueError(f"{source}: {', '.join(odd)} is not supported.")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_MOVES_THE_BASE):
        raise ValueError(
            f"{source}: init_lora_weights={start!r} has moved a part of the base into the adapter, "
            "which fits that changed base alone. Save it from PEFT as a plain LoRA: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )


def pattern_values(
    source: str, config: Mapping[str, Any], field: str, modules: Iterable[str], default: Any
) -> dict[str, Any]:
    """What rank_pattern or alpha_pattern says of each module: of the keys that match its end, the
    first."""
    modules, pattern = list(modules), config.get(field) or {}
    expressions = [rf"(.*\.)?({key})" for key in pattern]
    values = dict.fromkeys(modules, default)
    found = matching(f"{source}: {field}", expressions, modules)
    for matched, value in reversed(list(zip(found, pattern.values(), strict=True))):
        values |= dict.fromkeys(matched, value)
    return values


def as_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One value for each module, as a default and a pattern for those that differ."""
    default, _ = collections.Counter(values.values()).most_common(1)[0]
    return default, {re.escape(m): v for m, v in values.items() if v != default}


def target_modules(adapted: list[str], known: list[str]) -> list[str]:
    """The shortest list that PEFT reads as exactly these modules: suffixes, where all modules with
    that suffix are adapted, or whole names."""
    found = set()
    for module in adapted:
        suffix = module.rpartition(".")[2]
        alike = {name for name in known if name.rpartition(".")[2] == suffix}
        found.add(suffix if alike <= set(adapted) else module)
    return sorted(found)
