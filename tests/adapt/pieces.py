"""Pieces of programs that a property test composes: what foreign code does with a weight.

A piece is `piece(draw, held, args, then)`: it does something to what the program holds, and has
`then(held)` draw what follows. It returns the program from there on, `run(w, given)`. `held` says
what each axis of `w` is, `args` collects the program's further arguments, which `given` holds.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import normal
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

MESH = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
INTEGERS = ("int8", "uint8", "int16", "int32", "uint32")


@dataclasses.dataclass(frozen=True)
class Axis:
    """`side` is "stack", "in" or "out" for an axis of the leaf or a part of one, "new" for an axis
    of size 1 that the program has added. One that is `merged` of others is split where they were
    joined alone."""

    side: str
    size: int
    merged: bool = False


@dataclasses.dataclass(frozen=True)
class Held:
    """The form in which a program holds a weight.

    Attributes:
      axes: what each axis is.
      dtype: of the entries.
      sides: what a product may contract: "in", and "out" where the method can be transposed.
      looks_up: whether rows may be read.
      stacks: the sides of which parts may be layers.
      experts: whether rows may be sorted by its layers.
      convolves: whether a convolution may contract it.
      plain: whether it is an array by now, with which a program may do anything.
      on_mesh: whether it is inside a shard_map.
    """

    axes: tuple[Axis, ...]
    dtype: str = "float32"
    sides: tuple[str, ...] = ("in", "out")
    looks_up: bool = True
    stacks: tuple[str, ...] = ("in", "out")
    experts: bool = True
    convolves: bool = True
    plain: bool = False
    on_mesh: bool = False

    def having(self, *axes: Axis, **changes) -> "Held":
        return dataclasses.replace(self, axes=tuple(axes), **changes)

    def without(self, axis: int) -> "Held":
        return self.having(*self.axes[:axis], *self.axes[axis + 1 :])

    def resized(self, axis: int, size: int, **changes) -> "Held":
        new = dataclasses.replace(self.axes[axis], size=size)
        return self.having(*self.axes[:axis], new, *self.axes[axis + 1 :], **changes)

    def of(self, *sides: str) -> list[int]:
        return [i for i, axis in enumerate(self.axes) if axis.side in sides]

    def rows(self) -> list[int]:
        """The axes that are a whole side of the matrix, along which rows may be read."""
        named = {"in": self.of("in"), "out": self.of("out")}
        sides = self.sides if self.looks_up else ()
        return [named[side][0] for side in sides if len(named[side]) == 1]

    def slices(self) -> list[int]:
        parts = [i for i in self.of("in", "out") if not self.axes[i].merged]
        every = {*self.of("stack"), *self.rows(), *parts}
        every = range(len(self.axes)) if self.plain else sorted(every)
        return [i for i in every if self.axes[i].size]


@dataclasses.dataclass
class Arguments:
    """What a program takes beside its weight.

    Attributes:
      arrays: the arguments.
      dtypes: every floating-point dtype that it computes in.
      refused: the primitives that `adapt` must refuse, one of them; empty where it must not.
    """

    arrays: list[np.ndarray] = dataclasses.field(default_factory=list)
    dtypes: set[str] = dataclasses.field(default_factory=lambda: {"float32"})
    refused: tuple[str, ...] = ()

    def array(self, *shape: int) -> int:
        self.arrays.append(np.asarray(normal(100 + len(self.arrays), *shape)))
        return len(self.arrays) - 1

    def integers(self, draw, *shape: int, bound: int) -> int:
        """Integers of any dtype: within `bound`, negative, at its edges, far past its end."""
        dtype = np.dtype(draw(st.sampled_from(INTEGERS)))
        lowest = 0 if dtype.kind == "u" else -bound - 2
        odd = st.sampled_from([np.iinfo(dtype).min, np.iinfo(dtype).max])
        value = st.one_of(st.integers(lowest, bound + 2), st.integers(0, bound - 1), odd)
        count = int(np.prod(shape))
        values = draw(st.lists(value, min_size=count, max_size=count))
        self.arrays.append(np.array(values, dtype).reshape(shape))
        return len(self.arrays) - 1


Run = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Piece:
    make: Callable[..., Run]
    possible: Callable[[Held], bool]


MOVES: dict[str, Piece] = {}
ENDS: dict[str, Piece] = {}
REFUSED: dict[str, Piece] = {}


def piece(kind: dict[str, Piece], possible: Callable[[Held], bool] = lambda held: True):
    def register(make):
        kind[make.__name__] = Piece(make, possible)
        return make

    return register


def has(*sides: str) -> Callable[[Held], bool]:
    return lambda held: bool(held.of(*sides))


def pick(draw, choices) -> Any:
    return draw(st.sampled_from(list(choices)))


# Moves: the axes change places, are split, merged, added and dropped.


@piece(MOVES)
def transposed(draw, held, args, then):
    order = draw(st.permutations(range(len(held.axes))))
    rest = then(held.having(*(held.axes[i] for i in order)))
    return lambda w, given: rest(jnp.transpose(w, order), given)


@piece(MOVES, lambda held: len(held.axes) >= 2)
def moved_axis(draw, held, args, then):
    source, place = (draw(st.integers(-len(held.axes), len(held.axes) - 1)) for _ in range(2))
    order = np.moveaxis(np.empty(range(len(held.axes))), source, place).shape
    rest = then(held.having(*(held.axes[i] for i in order)))
    return lambda w, given: rest(jnp.moveaxis(w, source, place), given)


@piece(MOVES, lambda held: len(held.axes) < 6)
def expanded(draw, held, args, then):
    place = draw(st.integers(0, len(held.axes)))
    how = pick(draw, ["expand_dims", "broadcast", "reshape"])
    rest = then(held.having(*held.axes[:place], Axis("new", 1), *held.axes[place:]))

    def run(w, given):
        shape = (*w.shape[:place], 1, *w.shape[place:])
        if how == "expand_dims":
            return rest(jnp.expand_dims(w, place), given)
        kept = [i for i in range(len(shape)) if i != place]
        broadcast = jax.lax.broadcast_in_dim(w, shape, kept)
        return rest(broadcast if how == "broadcast" else w.reshape(shape), given)

    return run


@piece(MOVES, lambda held: any(axis.size == 1 for axis in held.axes) and len(held.axes) > 2)
def squeezed(draw, held, args, then):
    ones = [i for i, axis in enumerate(held.axes) if axis.size == 1]
    place = pick(draw, ones)
    index = draw(st.booleans())
    rest = then(held.without(place))

    def run(w, given):
        indexed = w[(slice(None),) * place + (0,)]
        return rest(indexed if index else jnp.squeeze(w, place), given)

    return run


def splittable(held: Held) -> list[int]:
    return [i for i, axis in enumerate(held.axes) if axis.size in (4, 6) and not axis.merged]


@piece(MOVES, lambda held: bool(splittable(held)) and len(held.axes) < 6)
def split_axis(draw, held, args, then):
    place = pick(draw, splittable(held))
    axis = held.axes[place]
    first = pick(draw, [n for n in (1, 2, 3) if axis.size % n == 0])
    parts = [Axis(axis.side, first), Axis(axis.side, axis.size // first)]
    axes = [*held.axes[:place], *parts, *held.axes[place + 1 :]]
    rest = then(held.having(*axes))
    return lambda w, given: rest(w.reshape([axis.size for axis in axes]), given)


def mergeable(held: Held) -> list[int]:
    sides = [axis.side for axis in held.axes]
    return [i for i in range(len(sides) - 1) if sides[i] == sides[i + 1]]


@piece(MOVES, lambda held: bool(mergeable(held)))
def merged_axes(draw, held, args, then):
    place = pick(draw, mergeable(held))
    first, second = held.axes[place : place + 2]
    merged = Axis(first.side, first.size * second.size, merged=True)
    axes = [*held.axes[:place], merged, *held.axes[place + 2 :]]
    rest = then(held.having(*axes))
    return lambda w, given: rest(w.reshape([axis.size for axis in axes]), given)


@piece(MOVES, lambda held: len(held.of("in", "new")) * len(held.of("out", "new")) >= 1)
def transposed_by_reshape(draw, held, args, then):
    """`lax.reshape` reads its operand in the order of `dimensions`."""
    order = draw(st.permutations(range(len(held.axes))))
    axes = [held.axes[i] for i in order]
    rest = then(held.having(*axes))
    sizes = [axis.size for axis in axes]
    return lambda w, given: rest(jax.lax.reshape(w, sizes, order), given)


# Moves: the entries stay what they are.


@piece(MOVES)
def cast(draw, held, args, then):
    dtype = pick(draw, ["bfloat16", "float16", "float32"])
    args.dtypes.add(dtype)
    rest = then(held.having(*held.axes, dtype=dtype))
    return lambda w, given: rest(w.astype(dtype), given)


@piece(MOVES)
def passed_on(draw, held, args, then):
    """What a program does to a weight for the compiler's sake."""
    how = pick(draw, [jnp.copy, jax.lax.stop_gradient, jax.lax.optimization_barrier])
    rest = then(held)
    return lambda w, given: rest(how(w), given)


@piece(MOVES, lambda held: not held.on_mesh)
def constrained(draw, held, args, then):
    sharding = NamedSharding(MESH, P())
    rest = then(held)
    return lambda w, given: rest(jax.lax.with_sharding_constraint(w, sharding), given)


@piece(MOVES, lambda held: not held.plain)
def multiplied(draw, held, args, then):
    """By a scalar, or along the axes of one side and of the stack."""
    side = draw(st.sampled_from(["in", "out", "none"]))
    along = [i for i in held.of(side, "stack") if side != "none" and draw(st.booleans())]
    sizes = [axis.size if i in along else 1 for i, axis in enumerate(held.axes)]
    factor = args.array(*sizes) if along else None
    divides = factor is None and draw(st.booleans())
    scales = any(held.axes[i].side != "stack" for i in along)
    rest = then(dataclasses.replace(held, experts=False, convolves=held.convolves and not scales))

    def run(w, given):
        if factor is None:
            return rest(w / jnp.asarray(2, w.dtype) if divides else -w, given)
        return rest(w * given[factor].astype(w.dtype), given)

    return run


# Moves: parts are read. Of a stack these are layers; along a side of the matrix, an array of rows.


@piece(MOVES, lambda held: bool(held.slices()))
def sliced(draw, held, args, then):
    place = pick(draw, held.slices())
    size = held.axes[place].size
    start, stop = draw(st.integers(-size - 1, size)), draw(st.integers(-size - 1, size + 2))
    window = slice(start, stop, draw(st.integers(1, 3)))
    picked = len(range(size)[window])
    is_array = held.plain or picked == 0 or (held.axes[place].side != "stack" and picked < size)
    rest = then(held.resized(place, picked, plain=is_array))
    return lambda w, given: rest(w[(slice(None),) * place + (window,)], given)


@piece(MOVES, lambda held: bool(held.slices()))
def sliced_dynamically(draw, held, args, then):
    place = pick(draw, held.slices())
    size = held.axes[place].size
    picked = draw(st.integers(0, size))
    start = args.integers(draw, bound=size)
    wraps = draw(st.booleans())
    is_array = held.plain or picked == 0 or (held.axes[place].side != "stack" and picked < size)
    rest = then(held.resized(place, picked, plain=is_array))

    def run(w, given):
        zero = jnp.zeros_like(given[start])
        starts = [given[start] if i == place else zero for i in range(w.ndim)]
        sizes = [picked if i == place else n for i, n in enumerate(w.shape)]
        return rest(jax.lax.dynamic_slice(w, starts, sizes, allow_negative_indices=wraps), given)

    return run


@piece(MOVES, lambda held: bool(held.slices()) and len(held.axes) > 2)
def indexed(draw, held, args, then):
    """One entry of an axis, by a number that the program knows, or by one that it is given."""
    place = pick(draw, held.slices())
    size = held.axes[place].size
    known = draw(st.integers(-size, size - 1)) if draw(st.booleans()) else None
    index = args.integers(draw, bound=size) if known is None else None
    is_array = held.plain or (held.axes[place].side != "stack" and size > 1)
    rest = then(dataclasses.replace(held.without(place), plain=is_array))

    def run(w, given):
        number = given[index] if known is None else known
        return rest(jax.lax.dynamic_index_in_dim(w, number, place, keepdims=False), given)

    return run


def even(held: Held) -> list[int]:
    return [i for i in held.slices() if held.axes[i].size % 2 == 0]


@piece(MOVES, lambda held: bool(even(held)))
def halved(draw, held, args, then):
    """`jnp.split`, and both parts are used."""
    place = pick(draw, even(held))
    is_array = held.plain or held.axes[place].side != "stack"
    half = held.resized(place, held.axes[place].size // 2, plain=is_array)
    first, second = then(half), then(half)

    def run(w, given):
        left, right = jnp.split(w, 2, axis=place)
        return first(left, given), second(right, given)

    return run


def layers(held: Held, *others: str) -> list[int]:
    return [i for i in held.of("stack", *others) if held.axes[i].size]


@piece(MOVES, lambda held: bool(layers(held)) and len(held.axes) > 2)
def unstacked(draw, held, args, then):
    place = pick(draw, layers(held))
    which = draw(st.integers(0, held.axes[place].size - 1))
    rest = then(held.without(place))
    return lambda w, given: rest(jnp.unstack(w, axis=place)[which], given)


# Moves: the rest of the program runs inside of something.


@piece(MOVES)
def inside_a_call(draw, held, args, then):
    call = pick(draw, [jax.jit, jax.checkpoint])
    rest = then(held)
    return lambda w, given: call(rest)(w, given)


@piece(MOVES)
def twice(draw, held, args, then):
    first, second = then(held), then(held)
    return lambda w, given: (first(w, given), second(w, given))


def sliceable(held: Held) -> bool:
    """Whether a loop or a map over the first axis leaves enough behind."""
    first = held.axes[0]
    return len(held.axes) > 2 and (first.side in ("stack", "new") or held.plain) and first.size > 0


@piece(MOVES, sliceable)
def scanned(draw, held, args, then):
    reverse, unroll = draw(st.booleans()), draw(st.integers(1, 2))
    length = held.axes[0].size if draw(st.booleans()) else None
    rest = then(held.without(0))

    def run(w, given):
        def layer(total, w):
            y = rest(w, given)
            return total + sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(y)), y

        return jax.lax.scan(layer, jnp.float32(0), w, reverse=reverse, unroll=unroll, length=length)

    return run


@piece(MOVES, lambda held: bool(layers(held, "new")) and len(held.axes) > 2)
def mapped(draw, held, args, then):
    place = pick(draw, layers(held, "new"))
    rest = then(held.without(place))
    return lambda w, given: jax.vmap(lambda w: rest(w, given), in_axes=place)(w)


@piece(MOVES)
def in_a_branch(draw, held, args, then):
    branch = args.integers(draw, bound=2)
    switch = draw(st.booleans())
    rest = then(held)

    def run(w, given):
        branches = [lambda: rest(w, given), lambda: jax.tree.map(jnp.negative, rest(w, given))]
        if switch:
            return jax.lax.switch(given[branch], branches)
        return jax.lax.cond(given[branch] > 0, *branches)

    return run


@piece(MOVES)
def looped(draw, held, args, then):
    """A `fori_loop` that closes over the weight or carries it, or a `while_loop` under a
    stop_gradient, for it has no reverse mode."""
    how = pick(draw, ["close", "carry", "while"])
    rest = then(held)

    def run(w, given):
        if how == "while":
            w, given = jax.lax.stop_gradient((w, given))
        start = rest(w, given)

        def body(i, carry):
            y, w_inside = carry if how == "carry" else (carry, w)
            y = jax.tree.map(lambda a, b: a / 2 + b, y, rest(w_inside, given))
            return (y, w_inside) if how == "carry" else y

        if how == "while":
            return jax.lax.while_loop(
                lambda state: state[0] < 2,
                lambda state: (state[0] + 1, body(state[0], state[1])),
                (0, start),
            )[1]
        carry = (start, w) if how == "carry" else start
        made = jax.lax.fori_loop(0, 2, body, carry)
        return made[0] if how == "carry" else made

    return run


@piece(MOVES, lambda held: not held.on_mesh)
def on_a_mesh(draw, held, args, then):
    rest = then(held.having(*held.axes, on_mesh=True))

    def run(w, given):
        specs = {"in_specs": (P(), P()), "out_specs": P()}
        return jax.shard_map(rest, mesh=MESH, **specs)(w, given)

    return run


# Ends.


def contractible(held: Held) -> list[str]:
    return [side for side in held.sides if held.of(side)]


@piece(ENDS, lambda held: bool(contractible(held)))
def product(draw, held, args, then):
    """An einsum, with letters in any order, or a `dot_general` of the same axes."""
    side = pick(draw, contractible(held))
    contracted, layers = held.of(side), held.of("stack")
    if held.plain or side in held.stacks:
        some = [i for i in contracted if draw(st.booleans())]
        if any(held.axes[i].size > 1 for i in some):
            layers += [i for i in contracted if i not in some]
            contracted = some
        other = {"in": "out", "out": "in"}[side]
        if any(held.axes[i].size > 1 for i in contracted) and (held.plain or other in held.stacks):
            layers += held.of(other)
    batch = [i for i in layers if draw(st.booleans())]
    letters = "abcdefgh"[: len(held.axes)]
    free = "yz"[: draw(st.integers(0, 2))]
    x_letters = [*draw(st.permutations([letters[i] for i in (*contracted, *batch)])), *free]
    x_letters = draw(st.permutations(x_letters))
    out = [*(letter for i, letter in enumerate(letters) if i not in contracted), *free]
    out = draw(st.permutations(out))
    sizes = {letter: axis.size for letter, axis in zip(letters, held.axes, strict=True)}
    x = args.array(*(sizes.get(letter, 2 + (letter == "z")) for letter in x_letters))
    terms, w_first = ["".join(x_letters), letters], draw(st.booleans())
    preferred = pick(draw, [None, None, "float32", "bfloat16"])
    if preferred:
        args.dtypes.add(preferred)
    equation = ",".join(terms[::-1] if w_first else terms) + "->" + "".join(out)
    rules = {
        "precision": pick(draw, [None, "highest", "default"]),
        "preferred_element_type": preferred,
    }
    # The gradient of x would else contract nothing, or parts of both sides.
    whole = set(batch) <= set(held.of("stack")) and contracted == held.of(side)
    gains = whole and "out" in held.sides
    own = pick(draw, [None, None, None, "vjp", "jvp"]) if gains else None

    def apply(x, w):
        return jnp.einsum(equation, *((w, x) if w_first else (x, w)), **rules)

    apply = {None: lambda f: f, "vjp": trebled, "jvp": doubled}[own](apply)
    return lambda w, given: apply(given[x].astype(held.dtype), w)


def trebled(apply):
    """With a gradient of its own: that of x is trebled."""
    new = jax.custom_vjp(apply)

    def backward(saved, dy):
        dx, dw = jax.vjp(apply, *saved)[1](dy)
        return 3 * dx, dw

    new.defvjp(lambda x, w: (apply(x, w), (x, w)), backward)
    return new


def doubled(apply):
    new = jax.custom_jvp(apply)

    @new.defjvp
    def _jvp(primals, tangents):
        y, dy = jax.jvp(apply, primals, tangents)
        return y, 2 * dy

    return new


@piece(ENDS, lambda held: bool(contractible(held)) and not held.plain)
def joined_product(draw, held, args, then):
    """Of the weight and something else, one after the other along an axis."""
    place = pick(draw, held.of("in", "out", "stack"))
    size = held.axes[place].size
    how = pick(draw, ["itself", "array", "pad"])
    low, high = draw(st.integers(0, 2)), draw(st.integers(1, 2))
    grown = {"itself": 2 * size, "array": size + 2, "pad": low + size + high}[how]
    sizes = [2 if i == place else axis.size for i, axis in enumerate(held.axes)]
    other = args.array(*sizes) if how == "array" else None
    apply = product(draw, held.resized(place, grown), args, then)

    def run(w, given):
        if how == "pad":
            edges = [(low, high) if i == place else (0, 0) for i in range(w.ndim)]
            return apply(jnp.pad(w, edges), given)
        last = -w if other is None else given[other].astype(w.dtype)
        return apply(jnp.concatenate([w, last], axis=place), given)

    return run


def sortable(held: Held) -> bool:
    one_each = all(len(held.of(side)) == 1 for side in ("stack", "in", "out"))
    return held.experts and not held.plain and one_each and len(held.axes) == 3


@piece(ENDS, sortable)
def sorted_by_expert(draw, held, args, then):
    """Some rows may have no expert."""
    side = pick(draw, contractible(held))
    order = [held.of(name)[0] for name in ("stack", side, {"in": "out", "out": "in"}[side])]
    count = held.axes[order[0]].size
    sizes = np.array([draw(st.integers(0, 3)) for _ in range(count)], np.int32)
    x = args.array(int(sizes.sum()) + draw(st.integers(1, 2)), held.axes[order[1]].size)

    def run(w, given):
        return jax.lax.ragged_dot(given[x].astype(w.dtype), jnp.transpose(w, order), sizes)

    return run


def convolvable(held: Held) -> list[str]:
    """The sides that a convolution may contract: the other is one axis, and no axis is stacked."""
    other = {"in": "out", "out": "in"}
    sides = contractible(held) if held.convolves and not held.of("stack") else []
    return [side for side in sides if len(held.of(other[side])) == 1]


@piece(ENDS, lambda held: bool(convolvable(held)) and not held.plain)
def convolved(draw, held, args, then):
    """With the axes of the kernel anywhere; the last one of its side is the channels."""
    side = pick(draw, convolvable(held))
    (out,) = held.of({"in": "out", "out": "in"}[side])
    *space, channels = [*held.of("new"), *held.of(side)]
    n = len(space)
    numbers = jax.lax.ConvDimensionNumbers(
        tuple(draw(st.permutations(range(n + 2)))),
        (out, channels, *space),
        tuple(draw(st.permutations(range(n + 2)))),
    )
    sizes = [0] * (n + 2)
    for place, size in zip(numbers.lhs_spec, [2, held.axes[channels].size, *[5] * n], strict=True):
        sizes[place] = size
    x = args.array(*sizes)
    how = {
        "window_strides": [draw(st.integers(1, 2)) for _ in space],
        "padding": [draw(st.sampled_from([(0, 0), (6, 7), (9, 8)])) for _ in space],
        "lhs_dilation": [draw(st.integers(1, 2)) for _ in space],
        "rhs_dilation": [draw(st.integers(1, 2)) for _ in space],
        "dimension_numbers": numbers,
    }

    def run(w, given):
        return jax.lax.conv_general_dilated(given[x].astype(held.dtype), w, **how)

    return run


def tables(held: Held) -> list[int]:
    return [i for i in held.rows() if held.axes[i].size > 1]  # the only row is the weight itself


@piece(ENDS, lambda held: bool(tables(held)) and not held.plain)
def looked_up(draw, held, args, then):
    place = pick(draw, tables(held))
    shape = draw(st.sampled_from([(), (1,), (3,), (2, 2), (0, 2)]))
    ids = args.integers(draw, *shape, bound=held.axes[place].size)
    how = pick(draw, ["index", "take", "get", "clip", "fill", "wrap"])
    fill = pick(draw, [None, 0.0, 7.0, np.nan, -np.inf])

    def run(w, given):
        if how == "index":
            return w[(slice(None),) * place + (given[ids],)]
        if how == "take":
            return jnp.take(w, given[ids], axis=place)
        if how == "get":
            indexed = w.at[(slice(None),) * place + (given[ids],)]
            return indexed.get(mode="promise_in_bounds")
        fills = {"fill_value": fill} if how == "fill" else {}
        return jnp.take(w, given[ids], axis=place, mode=how, **fills)

    return run


@piece(ENDS, lambda held: held.plain)
def returned(draw, held, args, then):
    return lambda w, given: w


# What `adapt` refuses.


def refusal(*primitives: str, possible: Callable[[Held], bool] = lambda held: True):
    """A piece that ends a program by `change(w)`, at which `adapt` stops at one of these."""

    def register(change):
        def make(draw, held, args, then):
            args.refused += primitives
            return lambda w, given: change(w)

        REFUSED[change.__name__] = Piece(make, lambda held: not held.plain and possible(held))
        return change

    return register


def large(held: Held) -> bool:
    return all(axis.size > 1 for axis in held.axes) and held.dtype == "float32"


@refusal("mul")
def scaled(w):
    return w * w


@refusal("add")
def added(w):
    return w + w


@refusal("integer_pow", "square", "mul", "reduce_sum")
def norm(w):
    return jnp.sum(w**2)


@refusal("rev", possible=large)
def reversed_axes(w):
    return w[::-1]


@refusal("select_n")
def selected(w):
    return jnp.where(np.ones(w.shape, bool), w, jnp.zeros_like(w))


@refusal("broadcast_in_dim")
def repeated(w):
    return jnp.broadcast_to(w, (3, *w.shape))


@refusal("convert_element_type")
def as_integers(w):
    return w.astype(jnp.int32).astype(jnp.float32)


@refusal("scatter")
def written_to(w):
    return w.at[(0,) * w.ndim].set(0)


@refusal("sort", possible=lambda held: large(held) and bool(held.of("in")) and bool(held.of("out")))
def flattened(w):
    return jnp.sort(w.reshape(-1))


@refusal("dot_general")
def squared(w):
    return jnp.tensordot(w, w, axes=w.ndim)


@refusal("gather", possible=lambda held: large(held) and len(held.axes) > 1)
def entries(w):
    return w[(np.array([0, 1]),) * w.ndim]


@refusal("cond", possible=large)
def from_a_branch(w):
    return jax.lax.cond(True, lambda: w, lambda: jnp.copy(w))
