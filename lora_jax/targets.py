"""Which leaves of a tree a rule picks: by path or by preset; every rule must match a leaf."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_jax.layouts import Layout
from lora_jax.paths import is_array, nearest

Targets = str | Sequence[str]

# What projections are called in the trees of Hugging Face, Flax, Llama's own code and GPT-2.
_ATTENTION_MODULE = r"(?:.*_)?(?:attn|attention|mha)(?:_\d+)?/.*"
_MLP_MODULE = r"(?:.*_)?(?:mlp|ffn|ff|feed_forward|feedforward)(?:_\d+)?/.*"
PRESETS: dict[str, str] = {
    "qv": r"[qv]_proj|w[qv]|query|value",
    "attention": rf"[qkvo]_proj|query|key|value|qkv_proj|c_attn|{_ATTENTION_MODULE}",
    "mlp": rf"(?:gate|up|down)_proj|fc[12]|c_fc|{_MLP_MODULE}",
    "all-linear": r".*",
}

_EMBEDDING = re.compile(r"(?:.*_)?embed(?:ding|dings|der)?(?:_.*)?|w[tp]e|token_embd")
_HEAD = re.compile(r"lm_head|unembed|unembedding|embed_out")
_ROOT_HEAD = re.compile(r"head|output|classifier")
_ROOTS = ("params", "model", "module")
_NOT_A_MATRIX = re.compile(r"(?:.*_)?(?:bias|scale|beta|gamma|b|offset)")
_NORM = re.compile(r"(?:.*_)?(?:norm|layernorm|rmsnorm|batchnorm|groupnorm|ln)(?:_.+|\d+)?", re.I)


@dataclasses.dataclass(frozen=True)
class Match:
    """A path that some rule picked."""

    path: str
    rule: str
    method: Any


def is_matrix_name(path: str) -> bool:
    """Whether a leaf of this name may be a matrix: norm scales and biases, stacked over layers,
    have two axes without being one."""
    *parents, last = path.split("/")
    if _NOT_A_MATRIX.fullmatch(last):
        return False
    return not any(_NORM.fullmatch(part) for part in (*parents[-1:], last))


def guessed_layout(path: str, leaf: Any) -> Layout | None:
    """A leaf of two axes or more is a stack of matrices, unless its name says otherwise."""
    has_two_axes = is_array(leaf) and len(leaf.shape) >= 2
    return Layout() if has_two_axes and is_matrix_name(path) else None


def is_embedding_or_head(path: str) -> bool:
    return is_head(path) or any(_EMBEDDING.fullmatch(part) for part in path.split("/"))


def is_head(path: str) -> bool:
    parts = path.split("/")
    outermost = next((part for part in parts if part not in _ROOTS), "")
    return any(_HEAD.fullmatch(part) for part in parts) or bool(_ROOT_HEAD.fullmatch(outermost))


def set_aside(path: str, layouts: Mapping[str, Layout | None]) -> bool:
    """Whether presets leave a leaf out, as an embedding or the output head. What is an embedding,
    the trace knows; without one, names tell."""
    layout = layouts.get(path)
    if layout is None:
        return is_embedding_or_head(path)
    return layout.gathered or is_head(path)


def rule_matcher(
    rule: str, layouts: Mapping[str, Layout | None] | None = None
) -> Callable[[str], bool]:
    """A predicate over paths: a preset by name, or a regular expression over whole components.
    `layouts` are those that a trace or the user gave."""
    try:
        pattern = re.compile(rf"(?:.*/)?(?:{PRESETS.get(rule, rule)})(?:/.*)?")
    except re.error as error:
        raise ValueError(f"target {rule!r} is not a valid regular expression: {error}.") from error
    if rule in PRESETS:
        known = layouts or {}
        return lambda path: bool(pattern.fullmatch(path)) and not set_aside(path, known)
    return lambda path: bool(pattern.fullmatch(path))


def match_rules(
    leaves: Mapping[str, Any],
    rules: Mapping[str, Any],
    layouts: Mapping[str, Layout | None] | None = None,
) -> list[Match]:
    """The paths that `rules` pick for a method, in tree order. Arguments and errors as
    `match_all`."""
    return [match for match in match_all(leaves, rules, layouts) if match.method is not None]


def match_all(
    leaves: Mapping[str, Any],
    rules: Mapping[str, Any],
    layouts: Mapping[str, Layout | None] | None = None,
) -> list[Match]:
    """The paths that `rules` pick, in tree order, those that are mapped to None too; the first rule
    that matches a path wins.

    Args:
      leaves: `{path: leaf}`.
      layouts: what is known of the leaves' axes, None for a leaf that is no matrix; names and
        shapes tell the rest.
      rules: `{target: method}`; a method passes over leaves that it does not accept, and the
        method None leaves what it matches frozen.

    Raises:
      ValueError: for a rule that matches nothing, naming the nearest paths that exist.
    """
    given = layouts or {}
    guessed = {path: guessed_layout(path, leaf) for path, leaf in leaves.items()}
    layouts = {**guessed, **given}
    taken: dict[str, Match] = {}
    for rule, method in rules.items():
        matches = rule_matcher(rule, given)
        named = [path for path in leaves if matches(path)]
        fitting = [p for p in named if method is None or method.accepts(p, leaves[p], layouts[p])]
        untaken = [path for path in fitting if path not in taken]
        if not untaken:
            raise ValueError(_explain(rule, method, list(leaves), named, fitting, taken))
        taken.update({path: Match(path, rule, method) for path in untaken})
    return [taken[path] for path in leaves if path in taken]


def as_rules(method: Any, targets: Targets) -> dict[str, Any]:
    """One method for all `targets`, or a mapping `{target: method}` as it is."""
    if isinstance(method, Mapping):
        if targets != "all-linear":
            raise ValueError(
                f"targets={targets!r} was given beside a mapping {{target: method}}, which already "
                "names its targets: drop one of the two."
            )
        rules = dict(method)
    else:
        names = (targets,) if isinstance(targets, str) else tuple(targets)
        rules = dict.fromkeys(names, method)
    if not rules:
        raise ValueError(
            "there is no target: give a preset "
            f"({', '.join(PRESETS)}) or a regular expression over paths."
        )
    return rules


def _explain(rule, method, paths, named, fitting, taken) -> str:
    if fitting:
        winners = sorted({taken[path].rule for path in fitting})
        return (
            f"target {rule!r} adds nothing: every path that it matches is already taken by "
            f"{', '.join(map(repr, winners))}, and the first match wins. Reorder or drop it."
        )
    if named:
        return (
            f"target {rule!r} matches {', '.join(named[:5])}, but {type(method).__name__} adapts "
            "matrices (two axes or more, neither a norm's scale nor a bias, and contracted with an "
            "activation where layouts tell). Target a matrix, or use Full for such leaves."
        )
    if rule in PRESETS:
        hint = "Name your tree's own paths by regular expressions"
    else:
        hint = f"Presets are {', '.join(PRESETS)}; a regular expression must match whole components"
    return (
        f"target {rule!r} matches nothing. The nearest paths are: "
        f"{', '.join(nearest(rule, paths))}. {hint}."
    )
