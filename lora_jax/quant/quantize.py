"""Trees of quantised weights, and back."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import paths
from lora_jax.layouts import Layout
from lora_jax.quant.formats import FORMATS
from lora_jax.quant.quantized import Quantized
from lora_jax.targets import Targets, as_rules, guessed_layout, match_rules, rule_matcher
from lora_jax.weights import PyTree, is_weight


def quantize(
    params: PyTree,
    format: str,
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

    Args:
      params: any pytree of arrays. Leaves that are not targeted are returned unchanged.
      format: a name in `lora_jax.quant.FORMATS`; its class documents it.
      targets: a preset, a regular expression over paths, or a sequence of them, as in
        `lora_transform`. Embeddings and output head are quantised only where they are named.
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
        or with a number of rows that is no multiple of the block size.

    Source: Dettmers et al. 2023, arXiv:2305.14314, section 3.
    """
    finish = quantizer(
        format, targets=".*", layouts=layouts, block_size=block_size, double_quant=double_quant
    )
    flat = paths.flatten(params, is_leaf=is_weight)
    for path in layouts or {}:
        if path not in flat:
            near = ", ".join(paths.nearest(path, flat))
            raise ValueError(f"layouts names {path!r}, which the tree lacks; near it are {near}.")
    chosen = [m.path for m in match_rules(flat, as_rules(_Matrices(), targets), layouts)]
    for path in chosen:
        leaf = flat[path]
        flat[path] = finish(path, leaf)
        if donate and isinstance(leaf, jax.Array):
            leaf.delete()
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_weight), flat.values())


def quantizer(
    format: str,
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
    if format not in FORMATS:
        raise ValueError(f"format {format!r}: expected one of {', '.join(FORMATS)}.")
    format_class = FORMATS[format]
    options = format_class.options(block_size, double_quant)
    matchers = [rule_matcher(rule) for rule in as_rules(_Matrices(), targets)]
    known = dict(layouts or {})

    def finish(path: str, leaf: Any) -> Any:
        layout = known[path] if path in known else guessed_layout(path, leaf)
        if layout is None or not any(matches(path) for matches in matchers):
            return jnp.asarray(leaf)
        _check(path, leaf, layout, format_class, options["block_size"])
        with paths.naming(path):
            return format_class.of(leaf, layout=layout, **options)

    return finish


def dequantize(tree: PyTree) -> PyTree:
    """The tree with every quantised weight as the plain array that it stands for.

    Concrete weights are decoded on the host, denormal values included, to the bits of bitsandbytes.
    Under a transformation XLA decodes them, with the same results for normal numbers.
    """
    return jax.tree.map(
        lambda w: w.dense_on_host() if isinstance(w, Quantized) else w, tree, is_leaf=is_weight
    )


class _Matrices:
    """A stand-in for a method in `match_rules`: accepts the leaves that a format can take."""

    def accepts(self, path: str, leaf: Any, layout: Layout | None) -> bool:
        del path, leaf
        return layout is not None


def _check(
    path: str, leaf: Any, layout: Layout, format_class: type[Quantized], block_size: int
) -> None:
    out = f"Leave it out of the targets ({path!r} was matched)."
    if is_weight(leaf):
        raise ValueError(f"{path} is a {type(leaf).__name__} already. {out}")
    if not paths.is_array(leaf):
        raise ValueError(f"{path} is a {type(leaf).__name__}, not an array. {out}")
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(f"{path} holds {leaf.dtype}: only real floating-point weights can be "
                         f"quantised. {out}")  # fmt: skip
    with paths.naming(path):
        _, contracted, _ = layout.split(leaf.shape)
    rows = math.prod(contracted)
    if rows % block_size:
        fitting = [size for size in format_class.block_sizes if rows % size == 0]
        instead = f"give block_size={fitting[-1]}, or leave" if fitting else "leave"
        raise ValueError(
            f"{path} has {rows} rows (d_in), no multiple of the block size {block_size}: {instead} "
            "it out of the targets."
        )
