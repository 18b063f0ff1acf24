"""Which weights an adapter should reach by its config, and which it reaches."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax import paths
from lora_jax.interop.digest import KEY, Digest, name_of
from lora_jax.interop.peft.codecs import codec_of
from lora_jax.interop.peft.folder import TENSORS, read_config, read_tensors
from lora_jax.interop.peft.names import HEAD, Names, parents, slots_of
from lora_jax.interop.verify.report import Finding
from lora_jax.layouts import Layout
from lora_jax.targets import guessed_layout, is_embedding_or_head
from lora_jax.weights import PyTree, is_weight

_INDEX = re.compile(r"(?<![^/])\d+(?![^/])")
_FEW = 0.1


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """An adapter's folder, not decoded.

    Attributes:
      folder: where it is.
      config: its adapter_config.json.
      tensors: the names in adapter_model.safetensors, without PEFT's prefix.
      own: the names of those that belong to no module.
      name: of the tensors' bits.
      digest: that of its metadata.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: tuple[str, ...]
    own: frozenset[str]
    name: str
    digest: Digest | None

    @classmethod
    def read(cls, folder: Path) -> "AdapterFile":
        """Of a folder that `load_adapter` has read."""
        config = read_config(folder)
        tensors, metadata = read_tensors(folder)
        codec = codec_of(str(folder), config)
        text = metadata.get(KEY)
        return cls(
            folder,
            config,
            tuple(n if n in codec.own else n.removeprefix(codec.prefix) for n in tensors),
            frozenset(codec.own),
            name_of(tensors),
            None if text is None else Digest.from_json(text, f"the digest in {folder / TENSORS}"),
        )

    def modules(self) -> set[str]:
        """The modules that tensors belong to, and their parents."""
        return {module for tensor in self.tensors for module in parents(tensor)}

    def placed_in(self, places: "Places") -> int:
        """How many tensors belong to one of these modules."""
        return sum(tensor in self.own or places.has(tensor) for tensor in self.tensors)


@dataclasses.dataclass(frozen=True)
class Places:
    """The modules of a base.

    Attributes:
      matrices: `{module: (path, layer)}` of all that a method may be on.
      others: norms and biases, which may be saved whole.
      delta_ends: the last components of the paths that the delta adapts: an untied head is not in
        the base's own names.
    """

    matrices: Mapping[str, tuple[str, int | None]]
    others: frozenset[str]
    delta_ends: frozenset[str]

    @classmethod
    def of(
        cls, params: PyTree, names: Names, layouts: Mapping[str, Layout | None], adapted: Iterable
    ) -> "Places":
        leaves = paths.flatten(params, is_leaf=is_weight)
        slots = slots_of(leaves, names, layouts)
        matrices = {module: (slot.path, slot.layer) for module, slot in slots.items()}
        others = {
            template.format(layer).removesuffix(".bias")
            for path, template in names.items()
            for layer in range(leaves[path].shape[0] if "{}" in template else 1)
        }
        ends = frozenset(path.rpartition("/")[2] for path in adapted)
        return cls(matrices, frozenset(others), ends)

    def has(self, tensor: str) -> bool:
        """Whether the tensor belongs to one of the modules."""
        ends = self.delta_ends
        if HEAD not in self.matrices:
            ends |= {HEAD}  # tied: saved beside the table
        return any(
            module in self.matrices or module in self.others or module.rpartition(".")[2] in ends
            for module in parents(tensor)
        )


def named_modules(
    config: Mapping[str, Any], known: Iterable[str]
) -> Iterator[tuple[str, set[str]]]:
    """Each name in adapter_config.json, and the modules of the base that it means."""
    known = list(known)
    for field in ("target_modules", "modules_to_save"):
        for rule in _rules(config.get(field), field):
            yield f"{field} names {rule!r}", {name for name in known if _means(rule, name, config)}


def _rules(value: Any, field: str) -> list[str]:
    if isinstance(value, str):
        # A repeated group can take for ever; "all-linear" has become a list where PEFT saved it.
        plain = value != "all-linear" and not re.search(r"\)[*+{]", value)
        return [f"^{value}"] if plain and field == "target_modules" else []
    return [rule for rule in value if isinstance(rule, str)] if isinstance(value, list) else []


def _means(rule: str, module: str, config: Mapping[str, Any]) -> bool:
    if rule.startswith("^"):
        try:
            hit = re.fullmatch(rule[1:], module) is not None
        except re.error:
            return False
    else:
        hit = module == rule or module.endswith(f".{rule}")
    layers, left_out = config.get("layers_to_transform"), config.get("exclude_modules")
    if hit and layers is not None:
        index = re.search(r"\.(\d+)\.", module)
        chosen = {layers} if isinstance(layers, int) else set(layers)
        hit = index is not None and int(index[1]) in chosen
    if hit and isinstance(left_out, list):
        hit = not any(module == name or module.endswith(f".{name}") for name in left_out)
    return hit


def unmet(file: AdapterFile, places: Places) -> list[Finding]:
    """Findings of names in the config that the file, or the base, does not have."""
    held = file.modules()
    ends = {module.rpartition(".")[2] for module in held}
    findings = []
    for what, modules in named_modules(file.config, [*places.matrices, *places.others]):
        rule = what.rpartition(" ")[2].strip("'")
        if not modules and rule.rpartition(".")[2] not in ends:
            text = f"{what}, and no module of this base is called so: what it means stays frozen"
            findings.append(Finding("error", text))
        elif missing := sorted(modules - held):
            share = f"{len(modules) - len(missing)} of {len(modules)}"
            findings.append(
                Finding(
                    "error",
                    f"{what}, and the file has tensors for {share} of its modules: "
                    f"{_listed(missing)} stay(s) as in the base",
                )
            )
    return findings


@dataclasses.dataclass(frozen=True)
class Reached:
    """How many linear matrices a base has, and how many of them an adapter changes."""

    matrices: int
    reached: int
    not_adapted: tuple[str, ...]
    findings: tuple[Finding, ...]


def reached(
    params: PyTree,
    layouts: Mapping[str, Layout | None],
    adapted: Iterable[str],
    changed: Mapping[str, np.ndarray],
    *,
    has_forms: bool,
) -> Reached:
    """Counts matrices layer by layer; layers in a list are counted like stacked ones.

    Args:
      params: the base.
      layouts: of leaves that are more than stacked matrices.
      adapted: the paths that the delta adapts.
      changed: `{path: bools}`, which layers of a path an update changes.
      has_forms: whether all of the delta's updates could be measured.
    """
    total: Counter[str] = Counter()
    ours: Counter[str] = Counter()
    adapted = set(adapted)
    for path, leaf in paths.flatten(params, is_leaf=is_weight).items():
        layout = layouts[path] if path in layouts else guessed_layout(path, leaf)
        if layout is None:
            continue
        name, layers = _INDEX.sub("{}", path), int(np.prod(layout.split(leaf.shape)[0], dtype=int))
        total[name] += layers
        if path in adapted:
            ours[name] += int(np.sum(changed.get(path, np.ones(layers, bool))))
    linear = {name for name in total if not is_embedding_or_head(name)}
    findings = _partly(total, ours)
    matrices, found = (sum(counts[name] for name in linear) for counts in (total, ours))
    if has_forms and 0 < found < _FEW * matrices:
        findings.append(
            Finding(
                "warning",
                f"the adapter reaches {found} of the base's {matrices} linear matrices "
                f"({100 * found / matrices:.0f} %)",
            )
        )
    return Reached(matrices, found, tuple(k for k in total if not ours[k]), tuple(findings))


def _partly(total: Mapping[str, int], ours: Mapping[str, int]) -> list[Finding]:
    """Findings of matrices that are adapted in some of their layers, one for each share."""
    alike: dict[tuple[int, int], list[str]] = {}
    for name, count in total.items():
        if 0 < ours[name] < count:
            alike.setdefault((ours[name], count), []).append(name)
    return [
        Finding(
            "warning",
            f"{_listed(names)}: {found} of {count} layers are adapted ({100 * found / count:.0f} "
            "%), the others stay as in the base",
        )
        for (found, count), names in alike.items()
    ]


def _listed(names: list[str], limit: int = 4) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
