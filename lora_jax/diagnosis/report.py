"""What `diagnose` returns: numbers by target, and their table."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from lora_jax.diagnosis import repair
from lora_jax.layouts import Layout
from lora_jax.tables import aligned
from lora_jax.transform import Delta
from lora_jax.weights import PyTree


@dataclasses.dataclass(frozen=True)
class Overlap:
    """`phi [stack..., i, j]` in [0, 1] of the leading i and j directions of two updates; entry
    (i - 1, j - 1) holds it. `input` compares what they read, `output` what they write."""

    input: np.ndarray
    output: np.ndarray


@dataclasses.dataclass(frozen=True)
class Intruders:
    """The k leading singular triplets of the tuned weight, and how new they are.

    Attributes:
      cosines: `[stack..., k]`, of each output direction with the nearest of the frozen weight's; 1
        where there is no update, or no such direction.
      is_new: `[stack..., k]`, where that is below the threshold: an intruder dimension.
      values: `[stack..., k]`, the tuned weight's singular values.
      u, v: `[stack..., d_in, k]` and `[stack..., d_out, k]`, its directions.
    """

    cosines: np.ndarray
    is_new: np.ndarray
    values: np.ndarray = dataclasses.field(repr=False)
    u: np.ndarray = dataclasses.field(repr=False)
    v: np.ndarray = dataclasses.field(repr=False)

    @property
    def count(self) -> np.ndarray:
        """`[stack...]`."""
        return self.is_new.sum(-1)


@dataclasses.dataclass(frozen=True)
class TargetDiagnosis:
    """The update of one target, an entry for each stacked layer; float32, on the host.

    Where there is no update, its numbers are 0: none is NaN.

    Attributes:
      path, method: of the target; the method by its node's name.
      shape: `(d_in, d_out)` of a layer's matrix.
      norm, spectral_norm: `[stack...]`, of the update: Frobenius, and the largest singular value.
      weight_norm, weight_spectral_norm: `[stack...]`, of the frozen weight.
      rank: `[stack...]`, how many singular values are more than rounding.
      effective_rank: `[stack...]`, see `diagnose`.
      amplification: `[stack...]`, see `diagnose`.
      spectrum: `[stack..., n]`, the update's singular values, largest first.
      overlaps: with each of the others that adapts this path, by name.
      intruders: None where they were not looked for.
    """

    path: str
    method: str
    shape: tuple[int, int]
    norm: np.ndarray
    spectral_norm: np.ndarray
    weight_norm: np.ndarray
    weight_spectral_norm: np.ndarray
    rank: np.ndarray
    effective_rank: np.ndarray
    amplification: np.ndarray
    spectrum: np.ndarray = dataclasses.field(repr=False)
    overlaps: Mapping[str, Overlap] = dataclasses.field(repr=False)
    intruders: Intruders | None = dataclasses.field(repr=False)

    @property
    def is_zero(self) -> np.ndarray:
        """`[stack...]`: where the target has no update."""
        return self.rank == 0

    @property
    def relative_norm(self) -> np.ndarray:
        """`[stack...]`: the update's norm over the weight's."""
        return self.norm / np.where(self.weight_norm == 0, np.inf, self.weight_norm)

    def rank_for(self, share: float = 0.9) -> np.ndarray:
        """`[stack...]`: how many singular values have this share of the update's squared norm
        (Biderman et al. 2024, arXiv:2405.09673, section 4.5, with 0.9); 0 where there is none."""
        if not 0 < share <= 1:
            raise ValueError(f"share={share!r}: expected a number above 0 and at most 1.")
        squares = np.cumsum(np.asarray(self.spectrum, np.float64) ** 2, axis=-1)
        total = squares[..., -1:]
        below = (squares < share * total * (1 - 1e-6)).sum(-1)
        return np.where(total[..., 0] == 0, 0, below + 1)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found: a row for each target, and what has none, with the reason.

    `str` gives the table; of stacked layers it has the mean, and the sum of intruders.
    """

    targets: Mapping[str, TargetDiagnosis]
    skipped: Mapping[str, str]
    base: PyTree = dataclasses.field(repr=False)
    delta: Delta = dataclasses.field(repr=False)
    layouts: Mapping[str, Layout] = dataclasses.field(repr=False)

    def repair(self, factor: float) -> Delta:
        """The delta with every intruder dimension's singular value times `factor`.

            W + dW'  =  W + dW + (factor - 1) * sum_j  s_j u_j v_j^T

        over the intruders `(u_j, s_j, v_j)` of `W + dW`: 1 changes nothing, 0 removes them. Scaled
        down to 0.7 to 0.9 they cost the task little and give back much of what was forgotten
        (Shuttleworth et al. 2024, arXiv:2410.21228, section 5).

        The sum has low rank, so that the result is what the method allows: LoRA, VeRA, AdaLoRA and
        LoHa become LoRA with a rank more for each intruder (of the layer that has most), DoRA stays
        DoRA with as many more. IA3, and a method of your own without `factors`, becomes `Full`,
        as large as its weight. Targets without an intruder, and all others, are returned as they
        are.

        Args:
          factor: at least 0.

        Raises:
          ValueError: for another factor, or where intruders were not looked for.
        """
        found = {path: row.intruders for path, row in self.targets.items()}
        return repair.repaired(self.base, self.delta, found, self.layouts, factor)

    def __str__(self) -> str:
        names = list(dict.fromkeys(n for row in self.targets.values() for n in row.overlaps))
        header = ("path", "delta", "norm / weight's", "spectral", "amplification", "eff. rank",
                  "of", "intruders", *names)  # fmt: skip
        lines = [aligned([header, *(_cells(row, names) for row in self.targets.values())], left=2)]
        if names:
            lines.append("Under a name: the overlap of all directions of both, of what they read.")
        lines += [f"{path}: not diagnosed: {why}" for path, why in self.skipped.items()]
        return "\n".join(lines)


def _cells(row: TargetDiagnosis, names: list[str]) -> tuple[str, ...]:
    if row.is_zero.all():
        return (row.path, row.method, "no update", *[""] * (5 + len(names)))
    spectral = row.spectral_norm / np.where(
        row.weight_spectral_norm == 0, np.inf, row.weight_spectral_norm
    )
    overlaps = [
        f"{row.overlaps[name].input[..., -1, -1].mean():.3f}" if name in row.overlaps else ""
        for name in names
    ]
    return (
        row.path,
        row.method,
        f"{row.relative_norm.mean():.4f}",
        f"{spectral.mean():.4f}",
        f"{row.amplification.mean():.2f}",
        f"{row.effective_rank.mean():.1f}",
        str(int(row.rank.max())),
        "" if row.intruders is None else str(int(row.intruders.count.sum())),
        *overlaps,
    )
