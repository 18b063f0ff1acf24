"""The report of `verify`, as values and as a table."""

import dataclasses
import statistics
from typing import Any, Literal

from lora_jax.tables import aligned

Level = Literal["error", "warning"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One adapted weight.

    Attributes:
      path: of the weight, or of a prompt or a prefix.
      node: the class of its delta node.
      relative: the norm of its update over the weight's norm, by layer; empty where the method
        cannot be merged.
      zero: the layers that are adapted and whose update is zero.
      absent: the layers without a tensor in the adapter's file.
    """

    path: str
    node: str
    relative: tuple[float, ...] = ()
    zero: tuple[int, ...] = ()
    absent: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """One other form of the adapter, compared with the bound one on the probe.

    Attributes:
      name: such as "merged in bfloat16".
      max_difference: the largest difference of a logit; None where the form could not be made.
      kl: the mean KL divergence of its predictions from the bound ones, in nats.
      of_effect: its difference from the bound logits over the adapter's own, as norms.
      why: why it could not be made.
    """

    name: str
    max_difference: float | None = None
    kl: float | None = None
    of_effect: float | None = None
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Finding:
    """An error, or a warning."""

    level: Level
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The findings of `verify`; `str` gives the table.

    Attributes:
      adapter: the folder, or "a delta".
      weights: the dtype or format of the base's matrices.
      tensors, matched: of the adapter's file, how many there are, and how many of them belong to a
        module of the base; None where the adapter is not a file.
      targets: the adapted weights.
      not_adapted: the matrices that it does not adapt, with `{}` for layers.
      matrices, reached: how many linear matrices the base has, layer by layer, and how many of them
        an update that is not zero reaches.
      probe_tokens: the length of the probe.
      max_change, kl_change: what the adapter does to the probe's logits: the largest change, and
        the mean KL divergence from the base's predictions, in nats.
      forms: other forms of the same adapter.
      digest: "agrees", or how it disagrees, or why there is none.
      findings: errors first.
    """

    adapter: str
    weights: str
    tensors: int | None
    matched: int | None
    targets: tuple[Target, ...]
    not_adapted: tuple[str, ...]
    matrices: int
    reached: int
    probe_tokens: int
    max_change: float
    kl_change: float
    forms: tuple[Form, ...]
    digest: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no error among the findings."""
        return not any(finding.level == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"ok": self.ok, **dataclasses.asdict(self)}

    def summary(self) -> str:
        """One line."""
        errors = sum(finding.level == "error" for finding in self.findings)
        warnings = len(self.findings) - errors
        said = f"{errors} error(s), {warnings} warning(s)" if self.findings else "nothing wrong"
        return (
            f"{said}; changes logits by up to {self.max_change:.3g}, KL {self.kl_change:.3g}; "
            f"digest: {self.digest.partition(':')[0]}"
        )

    def __str__(self) -> str:
        share = f"{self.reached} of {self.matrices} linear matrices"
        lines = [f"{self.adapter}, over {self.weights} weights"]
        if self.tensors is not None:
            percent = 100 * (self.matched or 0) / max(self.tensors, 1)
            lines.append(f"tensors with a place in the base: {self.matched} of {self.tensors} "
                         f"({percent:.0f} %)")  # fmt: skip
        lines += [
            f"reached: {share} ({100 * self.reached / max(self.matrices, 1):.0f} %); not adapted: "
            f"{', '.join(self.not_adapted) or 'nothing'}",
            f"logits of {self.probe_tokens} tokens: changed by up to {self.max_change:.3g}, KL "
            f"divergence from the base {self.kl_change:.3g}",
            f"digest: {self.digest}",
            "",
            aligned([_TARGETS, *map(_target, self.targets)], left=2),
        ]
        made = [form for form in self.forms if form.max_difference is not None]
        if made:
            lines += ["", aligned([_FORMS, *map(_form, made)])]
        lines += [f"{form.name}: {form.why}" for form in self.forms if form.why]
        lines += ["", *(f"{finding.level}: {finding.text}" for finding in self.findings)]
        return "\n".join(lines if self.findings else [*lines, "nothing wrong was found"])


_TARGETS = ("target", "delta", "layers", "update/weight, least", "median", "most", "by layer")
_FORMS = ("form, against the bound one", "largest difference", "KL", "of the effect")


def _target(target: Target) -> tuple[str, ...]:
    norms = target.relative
    if not norms:
        return (target.path, target.node, "", "", "", "", "")
    present = [norm for layer, norm in enumerate(norms) if layer not in target.absent]
    least, middle, most = (
        (min(present), statistics.median(present), max(present)) if present else (0.0, 0.0, 0.0)
    )
    shown = " ".join(f"{norm:.1e}" for norm in norms[:4]) + (" ..." if len(norms) > 4 else "")
    count = f"{len(present)}/{len(norms)}"
    return (target.path, target.node, count, *(f"{v:.2e}" for v in (least, middle, most)), shown)


def _form(form: Form) -> tuple[str, ...]:
    of_effect = "" if form.of_effect is None else f"{100 * form.of_effect:.3g} %"
    return (form.name, f"{form.max_difference or 0:.2e}", f"{form.kl or 0:.2e}", of_effect)
