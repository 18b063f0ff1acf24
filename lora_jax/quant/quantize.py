"""Trees of quantised weights, and back."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import paths
from lora_jax.layouts import Layout
from lora_jax.quant.formats import FORMATS
from lora_jax.quant.quantized import Quantized
from lora_jax.targets import (
    PRESETS,
    Targets,
    as_rules,
    guessed_layout,
    match_rules,
    rule_matcher,
)
from lora_jax.weights import PyTree, is_weight

Formats = str | Mapping[str, str | None]


def quantize(
    params: PyTree,
    format: Formats,
    *,
    targets: Targets = "all-linear",
    layouts: Mapping[str, Layout | None] | None = None,
    block_size: int | None = None,
    double_quant: bool | None = None,
    donate: bool = False,
) -> PyTree:
    """The tree with its targeted leaves as quantised weights, which every model here takes.

    The work is done on the host, leaf by leaf and layer by layer, in IEEE arithmetic: codes are
    those of bitsandbytes bit for bit, on every platform. Under `jit` it is a callback to the host,
    and under `jax.eval_shape` nothing is computed.

    A preset leaves in floats what a format does not take (a number of rows that is no multiple of
    the block size), with one warning that names it all and its bytes.

    Args:
      params: any pytree of arrays. Leaves that are not targeted are returned unchanged.
      format: a name in `lora_jax.quant.FORMATS`, whose class documents it; or, as the methods of
        `lora_transform`, an ordered mapping `{target: name}` in which the first rule that matches a
        path wins and None leaves a path in floats.
      targets: for a single format: a preset, a regular expression over paths, or a sequence of
        them, as in `lora_transform`. Embeddings and output head are quantised only where they are
        named.
      layouts: `{path: Layout}` for weights that are more than stacked matrices, and None for leaves
        that are none, as `infer_layouts` gives it.
      block_size: rows of the matrix that share a scale; by default 64 in the formats of
        `Blockwise`, which take powers of two from 8 to 4096.
      double_quant: whether each absmax is itself stored in 8 bits: 4.127 bits a parameter instead
        of 4.5 at blocks of 64. The default for formats that have an absmax; others raise on True.
      donate: deletes each targeted leaf once it is quantised, for trees that barely fit.

    Raises:
      ValueError: for an unknown format, an option that it does not have, a rule that matches
        nothing, and, naming the path, a leaf of integers or complex numbers, with NaN or infinity,
        or that a rule names and whose number of rows is no multiple of the block size: all such
        leaves in one message.

    Source: Dettmers et al. 2023, arXiv:2305.14314, section 3.
    """
    rules = _rules(format, targets, block_size, double_quant)
    flat = paths.flatten(params, is_leaf=is_weight)
    for path in layouts or {}:
        if path not in flat:
            near = ", ".join(paths.nearest(path, flat))
            raise ValueError(f"layouts names {path!r}, which the tree lacks; near it are {near}.")
    known = dict(layouts or {})
    chosen = match_rules(flat, rules, known)
    misfits = {m.path: m.method.misfit(m.path, flat[m.path], known) for m in chosen}
    named = [text for m in chosen if m.rule not in PRESETS and (text := misfits[m.path])]
    passed = {m.path: text for m in chosen if m.rule in PRESETS and (text := misfits[m.path])}
    if named or len(passed) == len(chosen):
        raise ValueError("\n".join(named or passed.values()))
    if passed:
        _warn_of_floats({path: flat[path] for path in passed}, next(iter(passed.values())))
    for match in chosen:
        if match.path in passed:
            continue
        leaf = flat[match.path]
        flat[match.path] = match.method.quantized(match.path, leaf, known)
        if donate and isinstance(leaf, jax.Array):
            leaf.delete()
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_weight), flat.values())


def quantizer(
    format: Formats,
    *,
    targets: Targets = "all-linear",
    layouts: Mapping[str, Layout | None] | None = None,
    block_size: int | None = None,
    double_quant: bool | None = None,
) -> Callable[[str, Any], Any]:
    """What `quantize` does to one leaf, as a function `(path, leaf) -> leaf`: for loaders, which
    then never hold a model in floating point. Leaves that are not targeted become plain arrays.

    Args:
      format: as in `quantize`.
      targets: as in `quantize`, but a rule that matches nothing is no error: leaves come singly.
      layouts: `{path: Layout}`; for leaves that it does not name, names and shapes decide.
      block_size, double_quant: as in `quantize`.

    Raises:
      ValueError: for an unknown format, or an option that it does not have; from the function, as
        `quantize` for a leaf.
    """
    known = dict(layouts or {})
    rules = _rules(format, targets, block_size, double_quant)
    matchers = {rule: rule_matcher(rule, known) for rule in rules}

    def finish(path: str, leaf: Any) -> Any:
        layout = known[path] if path in known else guessed_layout(path, leaf)
        rule = next((rule for rule, matches in matchers.items() if matches(path)), None)
        chosen = None if rule is None or layout is None else rules[rule]
        if chosen is None:
            return jnp.asarray(leaf)
        if text := chosen.misfit(path, leaf, known):
            if rule not in PRESETS:
                raise ValueError(text)
            _warn_of_floats({path: leaf}, text)
            return jnp.asarray(leaf)
        return chosen.quantized(path, leaf, known)

    return finish


def _rules(
    format: Formats, targets: Targets, block_size: int | None, double_quant: bool | None
) -> dict[str, "_Quantization | None"]:
    """By target, what is done to the matrices that it matches."""
    rules = as_rules(format, targets)
    for rule, name in rules.items():
        if name is not None and name not in FORMATS:
            of = f"target {rule!r} is mapped to" if isinstance(format, Mapping) else "format"
            raise ValueError(f"{of} {name!r}: expected one of {', '.join(FORMATS)}.")
    return {
        rule: None
        if name is None
        else _Quantization(FORMATS[name], FORMATS[name].options(block_size, double_quant))
        for rule, name in rules.items()
    }


def _warn_of_floats(leaves: Mapping[str, Any], why: str) -> None:
    size = sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves.values())
    warnings.warn(
        f"{', '.join(leaves)} stay in floats, {size:,} bytes, since the rows of each are no "
        f"multiple of the block size. The first: {why} None in the mapping of formats says so "
        "without a warning.",
        stacklevel=3,
    )


def dequantize(tree: PyTree) -> PyTree:
    """The tree with every quantised weight as the plain array that it stands for.

    Concrete weights are decoded on the host, denormal values included, to the bits of bitsandbytes.
    Under a transformation XLA decodes them, with the same results for normal numbers.
    """
    return jax.tree.map(
        lambda w: w.dense_on_host() if isinstance(w, Quantized) else w, tree, is_leaf=is_weight
    )


@dataclasses.dataclass(frozen=True)
class _Quantization:
    """A format with its options, in the place of a method: it accepts the leaves that it can take.

    Attributes:
      format: the class.
      options: of `format.of`.
    """

    format: type[Quantized]
    options: dict[str, Any]

    def accepts(self, path: str, leaf: Any, layout: Layout | None) -> bool:
        del path, leaf
        return layout is not None

    def misfit(self, path: str, leaf: Any, layouts: Mapping[str, Layout | None]) -> str | None:
        """Why the format does not take this leaf of floats.

        Raises:
          ValueError: for a leaf that no format takes.
        """
        _require_floats(path, leaf)
        with paths.naming(path):
            _, contracted, _ = (layouts.get(path) or Layout()).split(leaf.shape)
        rows, block_size = math.prod(contracted), self.options["block_size"]
        if rows % block_size == 0:
            return None
        fitting = [size for size in self.format.block_sizes if rows % size == 0]
        instead = f"give block_size={fitting[-1]}, or leave" if fitting else "leave"
        return (
            f"{path} has {rows} rows (d_in), no multiple of the block size {block_size}: {instead} "
            "it out of the targets."
        )

    def quantized(self, path: str, leaf: Any, layouts: Mapping[str, Layout | None]) -> Quantized:
        with paths.naming(path):
            return self.format.of(leaf, layout=layouts.get(path) or Layout(), **self.options)


def _require_floats(path: str, leaf: Any) -> None:
    out = f"Leave it out of the targets ({path!r} was matched)."
    if is_weight(leaf):
        raise ValueError(f"{path} is a {type(leaf).__name__} already. {out}")
    if not paths.is_array(leaf):
        raise ValueError(f"{path} is a {type(leaf).__name__}, not an array. {out}")
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(f"{path} holds {leaf.dtype}: only real floating-point weights can be "
                         f"quantised. {out}")  # fmt: skip
