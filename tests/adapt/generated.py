"""Programs that hypothesis composes of `pieces`, and the weights that they are run with."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pieces
from cases import METHODS, normal
from hypothesis import strategies as st
from pieces import Arguments, Axis, Held, Run

import lora_jax as lora


@dataclasses.dataclass(frozen=True)
class Kind:
    """What an adapted or quantised weight of a program is.

    Attributes:
      method: None for a quantised weight alone.
      format: of the base, where it is quantised.
      transposes: whether a product may contract the weight's outputs.
      looks_up: whether rows of it may be read.
      stacks: the sides of which parts may be layers of a stack.
      experts: whether rows may be sorted by the layers of its stack.
      convolves: whether it may be the kernel of a convolution.
    """

    method: lora.methods.Method | None
    format: str | None = None
    transposes: bool = True
    looks_up: bool = True
    stacks: tuple[str, ...] = ("in", "out")
    experts: bool = True
    convolves: bool = True

    def sides(self) -> tuple[str, ...]:
        return ("in", "out") if self.transposes else ("in",)


def _plain(name: str) -> lora.methods.Method:
    """A method of the registry, without what draws at random."""
    method = METHODS[name]
    return dataclasses.replace(method, dropout=0.0) if hasattr(method, "dropout") else method


PRODUCTS_ALONE = {"transposes": False, "looks_up": False}
KINDS = {
    "lora": Kind(_plain("lora")),
    "lora_variant": Kind(_plain("lora_variant")),
    "dora": Kind(_plain("dora"), transposes=False, stacks=("out",), experts=False),
    "ia3": Kind(_plain("ia3"), **PRODUCTS_ALONE),
    "ia3_input": Kind(lora.IA3(scales="input"), convolves=False, **PRODUCTS_ALONE),
    "vera": Kind(_plain("vera"), stacks=(), **PRODUCTS_ALONE),
    "adalora": Kind(_plain("adalora"), **PRODUCTS_ALONE),
    "full": Kind(_plain("full")),
    "nf4": Kind(None, "nf4", stacks=("out",)),
    "nf4_lora": Kind(_plain("lora"), "nf4", stacks=("out",)),
    "int8_dora": Kind(_plain("dora"), "int8", transposes=False, stacks=("out",), experts=False),
    "int8_ia3": Kind(_plain("ia3"), "int8", stacks=("out",), **PRODUCTS_ALONE),
}


@dataclasses.dataclass(frozen=True)
class Generated:
    """A program `run(params, given)` over `params["w"]`.

    Attributes:
      weight: the leaf.
      layout: of the leaf.
      asked: whether to run it with the layout that `infer_layouts` says, too.
      args: the program's further arguments; also what it must be refused for.
      names: of its pieces, outermost first.
    """

    run: Callable
    weight: np.ndarray
    layout: lora.Layout
    asked: bool
    args: Arguments
    names: tuple[str, ...]

    def __repr__(self) -> str:
        given = [f"{a.dtype}{list(a.shape)}" for a in self.args.arrays]
        odd = [a.tolist() for a in self.args.arrays if a.dtype.kind in "iu"]
        return (
            f"{' > '.join(self.names)} of {list(self.weight.shape)}, {self.layout}, "
            f"given {', '.join(given)} {odd}"
        )


@st.composite
def programs(draw, kind: Kind, length: int = 5) -> Generated:
    """A leaf of some axes, a chain of at most `length` moves, and an end, refused at times."""
    stack = [Axis("stack", draw(st.integers(1, 3))) for _ in range(draw(st.integers(0, 2)))]
    inner = [Axis("in", n) for n in draw(_sizes(kind))]
    outer = [Axis("out", n) for n in draw(st.sampled_from([(4,), (2, 3), (6,), (1, 2)]))]
    natural = [*stack, *inner, *outer]
    axes = draw(st.permutations(natural)) if draw(st.booleans()) else natural
    args, names = Arguments(), []
    refused = draw(st.sampled_from([False] * 7 + [True]))

    def then(held: Held, left: int) -> Run:
        ends = pieces.REFUSED if refused and not held.plain else pieces.ENDS
        now = pieces.MOVES if left else ends
        possible = [name for name, piece in now.items() if piece.possible(held)]
        if not possible:  # no end is possible yet: `plain` always has one, so read the layers
            now, possible = pieces.REFUSED, ["scaled"]
        name = draw(st.sampled_from(possible))
        names.append(name)
        return now[name].make(draw, held, args, lambda held: then(held, left - 1))

    held = Held(
        tuple(axes),
        sides=kind.sides(),
        looks_up=kind.looks_up,
        experts=kind.experts,
        convolves=kind.convolves,
        stacks=kind.stacks,
    )
    run = then(held, draw(st.integers(0, length)))
    return Generated(
        run=lambda params, given: run(params["w"], given),
        weight=np.asarray(normal(len(axes), *(axis.size for axis in axes))),
        layout=_layout(axes),
        asked=draw(st.booleans()),
        args=args,
        names=tuple(names),
    )


def _sizes(kind: Kind) -> st.SearchStrategy:
    """Of the contracted axes: a quantised matrix has rows in blocks of 8."""
    return st.sampled_from([(8,), (2, 4), (4, 2)] if kind.format else [(4,), (6,), (2, 3), (1,)])


def _layout(axes) -> lora.Layout:
    places = range(-len(axes), 0)
    return lora.Layout(
        *(tuple(i for i in places if axes[i].side == side) for side in ("in", "out"))
    )


def weights(program: Generated, kind: Kind, layout: lora.Layout | None = None) -> tuple[Any, Any]:
    """`(base, delta)` of the program's weight, which has the layout that it was generated for
    unless another is given."""
    layout = layout or program.layout
    base = {"w": program.weight}
    if kind.format:
        base = lora.quantize(base, kind.format, targets=".*", layouts={"w": layout}, block_size=8)
    return base, _delta(kind.method, base, layout) if kind.method else {}


def inferred(program: Generated) -> lora.Layout | None:
    """What `infer_layouts` says, where that is another layout than the program's own."""
    try:
        found = lora.infer_layouts(program.run, {"w": program.weight}, program.args.arrays)["w"]
    except ValueError as error:  # once by layers, once all layers at a time
        assert str(error).startswith("w, of shape")
        return None
    own = {program.layout.contracted, program.layout.output}
    return found if found and {found.contracted, found.output} != own else None


def _delta(method: Any, base: Any, layout: lora.Layout) -> Any:
    """A delta after some training, drawn by NumPy: for every new shape JAX compiles."""
    _, d_in, d_out = layout.split(base["w"].shape)
    if getattr(method, "rank", 1) > min(math.prod(d_in), math.prod(d_out)):
        target = {"target_rank": 1} if isinstance(method, lora.AdaLoRA) else {}
        method = dataclasses.replace(method, rank=1, **target)
    delta = jax.eval_shape(
        lambda base: lora.lora_transform(
            base, method, targets="w", layouts={"w": layout}, key=jax.random.key(0)
        )[1],
        base,
    )
    seeds = iter(range(100))

    def trained(path, leaf, trains):
        if trains:
            return 0.3 * np.asarray(normal(next(seeds), *leaf.shape))
        name = getattr(path[-1], "name", "")
        if name == "base_square":
            return _column_squares(lora.dequantize(base)["w"], layout).reshape(leaf.shape)
        return np.full(leaf.shape, 2.0 if name == "scale" else 1.0, leaf.dtype)

    return jax.tree_util.tree_map_with_path(trained, delta, lora.trainable_mask(delta))


def _column_squares(weight: Any, layout: lora.Layout) -> np.ndarray:
    order = (*layout.stack_axes(weight.ndim), *layout.contracted, *layout.output)
    moved = np.transpose(np.asarray(weight), order)
    stacked = len(order) - len(layout.contracted) - len(layout.output)
    return np.square(moved).sum(tuple(range(stacked, stacked + len(layout.contracted))))
