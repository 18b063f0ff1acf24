"""The bookkeeping of axes, against arrays that hold their own indices."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.tracing.axes import Axes


def entries(axes: Axes, leaf: np.ndarray) -> np.ndarray:
    """The array that `axes` describes, read off the leaf atom by atom."""
    atoms = axes.all()
    split = sorted(atoms)
    whole = leaf.reshape([atom.size for atom in split])
    return whole.transpose([split.index(atom) for atom in atoms]).reshape(axes.shape)


@st.composite
def histories(draw):
    """A leaf and what became of it: transposes and reshapes that keep its size."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    size = math.prod(shape)
    moves = []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            moves.append(("transpose", draw(st.randoms(use_true_random=False))))
        else:
            divisors = [n for n in range(1, size + 1) if size % n == 0]
            first = draw(st.sampled_from(divisors))
            rest = size // first
            second = draw(st.sampled_from([n for n in divisors if rest % n == 0]))
            moves.append(("reshape", (first, second, rest // second)))
    return shape, moves


@settings(max_examples=300, deadline=None)
@given(histories())
def test_axes_follow_an_array(history):
    shape, moves = history
    leaf = np.arange(math.prod(shape)).reshape(shape)
    axes, array = Axes.of_leaf(shape), leaf
    for kind, how in moves:
        if kind == "transpose":
            order = list(range(array.ndim))
            how.shuffle(order)
            axes, array = axes.transposed(order), array.transpose(order)
        else:
            axes = axes.reshaped(how)
            if axes is None:
                return
            array = array.reshape(how)
        assert axes.shape == array.shape
        present = [atom for atom in axes.all() if atom.size > 1]
        assert math.prod(atom.size for atom in present) == leaf.size
        np.testing.assert_array_equal(entries(axes, leaf), array)


def test_an_axis_that_cannot_be_split_evenly():
    assert Axes.of_leaf((6, 4)).reshaped((4, 6)) is None


def test_broadcasting_adds_axes_of_size_one_alone():
    axes = Axes.of_leaf((2, 3))
    assert axes.broadcast((2, 1, 3), (0, 2)).shape == (2, 1, 3)
    assert axes.broadcast((5, 2, 3), (1, 2)) is None
