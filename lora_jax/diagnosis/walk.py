"""`diagnose`: the walk over a base, a delta and others."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax import paths
from lora_jax.diagnosis.measure import measured
from lora_jax.diagnosis.report import Diagnosis, Intruders, Overlap, TargetDiagnosis
from lora_jax.layouts import ENTRIES, Layout
from lora_jax.methods import DeltaNode, Extra
from lora_jax.targets import guessed_layout
from lora_jax.transform import Delta, delta_nodes
from lora_jax.weights import PyTree, is_weight


def diagnose(
    base: PyTree,
    delta: Delta,
    *,
    others: Mapping[str, Delta] | None = None,
    layouts: Mapping[str, Layout | None] | None = None,
    top: int = 10,
    threshold: float = 0.5,
    directions: int = 64,
) -> Diagnosis:
    """What an update `dW` does to each weight `W`: how large it is, where it points, what is new.

    With the SVD `dW = U diag(s) V^T` of each layer's matrix, `x @ (W + dW)`:

    - norms: `|dW|_F` and the largest s, beside those of W.
    - amplification: `|dW|_F / |U^T W V|_F`, how much more the update makes of its directions than W
      has there (Hu et al. 2021, arXiv:2106.09685, section 7.3 and appendix H.4).
    - effective rank: `exp(-sum_i p_i log p_i)`, `p_i = s_i / sum(s)` (Roy and Vetterli 2007, "The
      effective rank"); `rank_for(0.9)` is that of Biderman et al. 2024, arXiv:2405.09673.
    - overlap: `phi(i, j) = |U_i^T U'_j|_F^2 / min(i, j)` of the leading i and j directions of two
      updates, 1 where one subspace holds the other, 0 where they are orthogonal (Hu et al. 2021,
      section 7.2, equation 4). The paper takes U of the factor A alone, which is not unique; here U
      and V are of `dW`, and no change of factors changes them.
    - intruder dimensions: of the `top` leading singular vectors `y_j` of `W + dW`, those with
      `max_i |cos(y_j, x_i)| < threshold` over all singular vectors `x_i` of W (Shuttleworth et al.
      2024, arXiv:2410.21228, section 3), on the side of the outputs, as there.
      `Diagnosis.repair` shrinks them.

    Where a method's update is a product `a @ b` (LoRA, AdaLoRA, VeRA, LoHa), its spectrum comes
    from QR of the factors and an SVD between them, and no dense update is built. Of a Full delta,
    and of the difference of merged and frozen weight for others (DoRA, IA3), one layer after
    another is decomposed by an SVD. Intruders need singular vectors of W and of `W + dW`: they
    come from the eigenvectors of Gram matrices of the smaller side, one layer at a time, about
    `18 min^3 + 4 d_in d_out min` operations each (`diagnosis.spectra.by_gram` has the error). All
    in float32, quantised weights as they decode.

    Args:
      base: the frozen tree; arrays or quantised weights, of any float dtype.
      delta: its delta.
      others: `{name: delta}` of further deltas over this base, to compare directions with, on the
        paths that both adapt.
      layouts: as for `lora_transform`; needed where a Full delta has weights of more axes than a
        stack of matrices has. A path mapped to None is no matrix.
      top: how many of the leading directions may be intruders; 0 looks for none, and spares what
        they cost.
      threshold: the cosine below which a direction is new.
      directions: how many of the leading directions overlaps compare at most.

    Returns:
      A `Diagnosis`: `targets[path]` has arrays with the weight's stack axes in front; `skipped`
      lists what has no row, such as biases and norm scales, prompts, and methods without a merged
      form.

    Raises:
      ValueError: for a delta that does not fit the base, or adapts no matrix; for another delta
        that shares no target with it, or does not fit; for values that are traced, abstract, on
        other hosts or not finite; for an argument out of its range.
    """
    _check(top, threshold, directions)
    flat = paths.flatten(base, is_leaf=is_weight)
    for path in layouts or {}:
        _require_known(path, flat, "layouts names")
    axes, nodes, skipped = _updates(flat, delta, layouts or {})
    if not nodes:
        why = "".join(f"; {path}: {reason}" for path, reason in skipped.items())
        raise ValueError(
            f"the delta has no update of a matrix to diagnose{why or ': it is empty'}. Give a "
            "delta that lora_transform made for matrices."
        )
    theirs = {
        name: _other(name, other, flat, axes, layouts or {})
        for name, other in (others or {}).items()
    }
    targets = {}
    for path, node in nodes.items():
        shared = {name: found[path] for name, found in theirs.items() if path in found}
        stack, d_in, d_out = axes[path].split(flat[path].shape)
        numbers, overlaps = measured(
            flat[path],
            node,
            list(shared.values()),
            layout=axes[path],
            stack_ndim=len(stack),
            top=min(top, int(np.prod(d_in)), int(np.prod(d_out))),
            directions=directions,
        )
        targets[path] = _row(path, node, (d_in, d_out), numbers, threshold, shared, overlaps)
    return Diagnosis(targets, skipped, base, delta, axes)


def _updates(
    flat: Mapping[str, Any], delta: Delta, layouts: Mapping[str, Layout | None]
) -> tuple[dict[str, Layout], dict[str, DeltaNode], dict[str, str]]:
    """The layouts and resolved nodes of all matrices of a delta, and why others are left out."""
    every = delta_nodes(delta)
    axes, nodes, skipped = {}, {}, {}
    for path, node in every.items():
        if isinstance(node, Extra):
            if node.in_weights:
                skipped[path] = f"a {type(node).__name__} belongs to no weight."
            continue
        _require_known(path, flat, "the delta adapts")
        weight = flat[path]
        node.check(path, weight)
        _require_values(path, (weight, node))
        layout = _layout(path, weight, node, layouts)
        if node.unmerged:
            skipped[path] = node.unmerged
        elif layout is None:
            skipped[path] = "no matrix."
        else:
            with paths.naming(path):
                layout.split(weight.shape)
                axes[path], nodes[path] = layout, node.resolve(weight, every)
    return axes, nodes, skipped


def _layout(
    path: str, weight: Any, node: DeltaNode, layouts: Mapping[str, Layout | None]
) -> Layout | None:
    if node.layout != ENTRIES:
        return node.layout
    if path in layouts:
        return layouts[path]
    return weight.layout if is_weight(weight) else guessed_layout(path, weight)


def _other(
    name: str,
    other: Delta,
    flat: Mapping[str, Any],
    axes: Mapping[str, Layout],
    layouts: Mapping[str, Layout | None],
) -> dict[str, DeltaNode]:
    with paths.naming(f"others[{name!r}]"):
        theirs, found, _ = _updates(flat, other, layouts)
        if not axes.keys() & found.keys():
            raise ValueError(
                f"it adapts {_some(found)}, the delta {_some(axes)}: there is no target of both "
                "to compare. Give deltas that share a target."
            )
        for path in axes.keys() & found.keys():
            if axes[path] != theirs[path]:
                raise ValueError(
                    f"{path}: it takes the weight as {theirs[path]}, the delta as {axes[path]}: "
                    "name the one that holds in layouts."
                )
    return found


def _row(path, node, sides, numbers, threshold, shared, overlaps) -> TargetDiagnosis:
    numbers, overlaps = jax.device_get((numbers, overlaps))
    finite = np.isfinite(numbers["norm"]) & np.isfinite(numbers["weight_norm"])
    if not finite.all():
        what = "weight" if not np.isfinite(numbers["weight_norm"]).all() else "update"
        raise ValueError(
            f"{path}: the {what} has values that are not finite numbers. If training has diverged, "
            "take an earlier checkpoint."
        )
    intruders = None
    if "cosines" in numbers:
        parts = [numbers.pop(name) for name in ("cosines", "values", "u", "v")]
        intruders = Intruders(parts[0], parts[0] < threshold, *parts[1:])
    return TargetDiagnosis(
        path=path,
        method=type(node).__name__,
        shape=(int(np.prod(sides[0])), int(np.prod(sides[1]))),
        overlaps={n: Overlap(*pair) for n, pair in zip(shared, overlaps, strict=True)},
        intruders=intruders,
        **numbers,
    )


def _require_known(path: str, flat: Mapping[str, Any], what: str) -> None:
    if path not in flat:
        raise ValueError(
            f"{what} {path!r}, which the base does not have; the nearest paths are: "
            f"{', '.join(paths.nearest(path, flat))}. Diagnose a delta over the base that it was "
            "made for."
        )


def _require_values(path: str, trees: Any) -> None:
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, jax.ShapeDtypeStruct) or not paths.is_known(leaf):
            raise ValueError(
                f"{path}: diagnose reads values, and these are abstract, traced by a transform "
                "such as jit, or on other hosts. Call it outside of jit, on arrays of this host."
            )


def _check(top: int, threshold: float, directions: int) -> None:
    for name, value, least in (("top", top, 0), ("directions", directions, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: expected an integer of at least {least}.")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold!r}: expected a cosine, between 0 and 1.")


def _some(found: Mapping[str, Any]) -> str:
    names = list(found)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "no matrix"
