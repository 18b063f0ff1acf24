"""The check: `verify`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.interop.digest import Digest, formats_of
from lora_jax.interop.forward import AnyForward, ModelForward
from lora_jax.interop.peft.files import load_adapter
from lora_jax.interop.peft.names import ModelNames, Names
from lora_jax.interop.verify.bound import Bound
from lora_jax.interop.verify.coverage import AdapterFile, Places, reached, unmet
from lora_jax.interop.verify.merged import kl_divergence
from lora_jax.interop.verify.norms import update_norms
from lora_jax.interop.verify.report import Finding, Form, Level, Report, Target
from lora_jax.layouts import Layout
from lora_jax.methods import FullNode
from lora_jax.transform import Delta, delta_nodes
from lora_jax.weights import PyTree

FORMS = ("merged", "read back")
_NOTHING = 1e-6  # an update below this, relative to its weight, is float32's rounding
_NOTICED, _LOST = 0.1, 0.5  # of the adapter's effect, by which another form is off

Peer = Callable[[np.ndarray], np.ndarray]


def verify(
    adapter: str | Path | Delta,
    params: PyTree,
    names: Names | None = None,
    *,
    forward: AnyForward | None = None,
    probe: Sequence[int] | None = None,
    against: Mapping[str, Digest] | None = None,
    peers: Mapping[str, Peer] | None = None,
    forms: Sequence[str] = FORMS,
    layouts: Mapping[str, Layout | None] | None = None,
    num_kv_heads: int | None = None,
    check_base: bool = True,
) -> Report:
    """Checks that an adapter reaches its targets, changes the model, and computes the same in every
    form.

    For each target it measures the update relative to its weight, layer by layer. On a probe it
    measures how the adapter changes the logits, and how far from these they are where the adapter
    is merged in float32, merged in the base's dtype (and quantised again in the base's format),
    written and read back, and run by `peers`. An adapter with a digest is checked against it. A
    merged weight is built where an activation meets it: there is no merged tree.

    Args:
      adapter: a folder that `load_adapter` reads, or a delta.
      params: the base, of plain arrays, quantised, or both.
      names: `model_names(config)`, which determines the model too; for others `{path: module}`. A
        delta with `forward` needs none.
      forward: another model.
      probe: token ids; by default those of the adapter's digest, or fixed ones.
      against: `{name: Digest}` of what runs elsewhere, such as on a server.
      peers: `{name: function}` of other programs that have the adapter: from tokens `[1, T]` to
        logits `[1, T, V]`.
      forms: which of `FORMS` to try.
      layouts: of leaves that are more than stacked matrices.
      num_kv_heads: of the model, where it is not our Llama and the adapter a prefix.
      check_base: whether another base is an error; else it is a finding.

    Raises:
      FileNotFoundError: the folder, or a file of it, is missing.
      ValueError: where `load_adapter` raises, with the share of the tensors that belong to a module
        of the base; another base; a base of shapes alone; a probe that is empty, longer than the
        context or not of this vocabulary.
    """
    forward = _forward(forward, names)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        raise ValueError("verify runs the model: it needs the base's weights, not shapes alone.")
    if unknown := sorted(set(forms) - set(FORMS)):
        raise ValueError(f"forms has {', '.join(unknown)}; expected some of {', '.join(FORMS)}.")
    if isinstance(names, ModelNames) and num_kv_heads is None:
        num_kv_heads = names.config.num_kv_heads
    layouts = dict(layouts or {})
    delta, file = _loaded(adapter, params, names, layouts, check_base)
    model = Bound.of(forward, params, delta)
    digest = file.digest if file else None
    findings: list[Finding] = []
    said = "none: it is no file" if file is None else "none: it was exported without one"
    if file and digest:
        said = model.held_to(digest, file.name, check_base, str(file.folder))
        if said != "agrees":
            findings.append(Finding("error", f"the digest disagrees: {said}"))
            said = f"disagrees: {said}"
    model.read(probe if probe is not None else digest.tokens if digest else None)

    targets, changed, more = _targets(params, delta, names, file)
    coverage = reached(params, layouts, delta_nodes(delta), changed,
                       has_forms=len(changed) == len(targets))  # fmt: skip
    findings += [*more, *coverage.findings]
    matched = None
    if file and names is not None:
        places = Places.of(params, names, layouts, delta_nodes(delta))
        matched = file.placed_in(places)
        findings += unmet(file, places)
    findings += model.without_effect()
    tried: list[Form] = []
    if "merged" in forms:
        tried += model.merged()
    if "read back" in forms and names is not None:
        tried.append(model.read_back(names, layouts, num_kv_heads))
    tried += [model.form(name, np.asarray(run_peer(model.tokens[None])))
              for name, run_peer in (peers or {}).items()]  # fmt: skip
    findings += [found for form in tried if (found := _finding(form))]
    for name, other in (against or {}).items():
        findings += model.compared(name, other, file.name if file else "")
    return Report(
        adapter=str(adapter) if file else "a delta",
        weights=formats_of(params),
        tensors=len(file.tensors) if file else None,
        matched=matched,
        targets=tuple(targets),
        not_adapted=coverage.not_adapted,
        matrices=coverage.matrices,
        reached=coverage.reached,
        probe_tokens=len(model.tokens),
        max_change=float(np.abs(model.after - model.before).max()),
        kl_change=kl_divergence(model.before, model.after),
        forms=tuple(tried),
        digest=said,
        findings=tuple(sorted(findings, key=lambda finding: finding.level)),
    )


def _forward(forward: AnyForward | None, names: Names | None) -> AnyForward:
    if forward is not None:
        return forward
    if not isinstance(names, ModelNames):
        raise ValueError(
            "verify runs the model: give names=model_names(config) for our Llama, or "
            "forward=Forward(apply=adapt(fn), vocab_size=...) for another model."
        )
    return ModelForward(names.config)


def _loaded(
    adapter: Any, params: PyTree, names: Names | None, layouts: Mapping, check_base: bool
) -> tuple[Delta, AdapterFile | None]:
    if isinstance(adapter, Mapping):
        return dict(adapter), None
    folder = Path(adapter)
    if names is None:
        raise ValueError(f"{folder} is read by the modules' names: give names.")
    try:
        delta = load_adapter(folder, params, names, layouts=layouts, check_base=check_base)
    except ValueError as error:
        share = _share(folder, params, names, layouts)
        raise ValueError(f"{error}{share}") from error
    return delta, AdapterFile.read(folder)


def _share(folder: Path, params: PyTree, names: Names, layouts: Mapping) -> str:
    """For an adapter that cannot be loaded, how many of its tensors belong to the base; empty if
    all."""
    try:
        file = AdapterFile.read(folder)
    except Exception:  # the error of the folder has been raised, with a better message
        return ""
    places = Places.of(params, names, layouts, ())
    matched = file.placed_in(places)
    if matched == len(file.tensors):
        return ""
    return f" Of its {len(file.tensors)} tensors {matched} have a place in this base."


def _targets(
    params: PyTree, delta: Delta, names: Names | None, file: AdapterFile | None
) -> tuple[list[Target], dict[str, np.ndarray], list[Finding]]:
    """Each target's norms; which layers are changed; findings of updates that are zero."""
    norms = update_norms(params, delta)
    held = file.modules() if file else None
    targets, changed, findings = [], {}, []
    for path, node in delta_nodes(delta).items():
        name = type(node).__name__
        if path not in norms:
            targets.append(Target(path=path, node=name))
            continue
        update, weight = norms[path]
        relative = update / np.maximum(weight, 1e-30)
        changed[path] = relative > _NOTHING
        absent = _absent(path, len(relative), names, held)
        zero = [i for i in np.flatnonzero(~changed[path]).tolist() if i not in absent]
        targets.append(
            Target(
                path=path,
                node=name,
                relative=tuple(map(float, relative)),
                zero=tuple(zero),
                absent=tuple(absent),
            )
        )
        if zero and len(zero) + len(absent) == len(relative):
            # A bias that is zero stays zero; a module that is saved whole may be trained in part.
            is_bias = (names or {}).get(path, "").endswith(".bias")
            level: Level = "warning" if is_bias or isinstance(node, FullNode) else "error"
            findings.append(Finding(level, f"{path} does nothing: its update is zero"))
        elif zero:
            layers = f"layer(s) {', '.join(map(str, zero))} of {len(relative)}"
            findings.append(Finding("warning", f"{path} does nothing in {layers}"))
    return targets, changed, findings


def _absent(path: str, layers: int, names: Names | None, held: set[str] | None) -> list[int]:
    """The layers without a tensor in the file."""
    template = (names or {}).get(path)
    if held is None or template is None or "{}" not in template:
        return []
    return [i for i in range(layers) if template.format(i).removesuffix(".bias") not in held]


def _finding(form: Form) -> Finding | None:
    if form.of_effect is None or form.of_effect <= _NOTICED:
        return None
    percent, lost = f"{100 * form.of_effect:.0f} %", form.of_effect > _LOST
    text = (
        f"{form.name}: the logits are off by {percent} of what the adapter changes (KL "
        f"{form.kl:.2g})" + (", so that most of it is lost or is another" if lost else "")
    )
    return Finding("error" if lost else "warning", text)
