"""What follows from the axes that a node declares."""

import flax.struct
import jax
import jax.numpy as jnp
import pytest
from cases import assert_close, normal
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax.nodes import Additive
from lora_jax.schema import leaf, leaves_of, static

KERNEL = lora.Layout(contracted=(-3,), output=(-2, -1))


@flax.struct.dataclass
class Outer(Additive):
    """`u v^T`: a method in a dozen lines."""

    u: jax.Array = leaf("stack in", mirror="v")
    v: jax.Array = leaf("stack out", mirror="u", absent=0)
    layout: lora.Layout = static(lora.Layout())

    def branch(self, x, product):
        return product.widen(product.narrow(x, self.u[:, None]), self.v[None])


NODE = Outer(u=normal(0, 3, 6), v=normal(1, 3, 5))
HEADS = Outer(u=normal(0, 6), v=normal(1, 2, 4), layout=KERNEL)
W = normal(2, 3, 6, 5)


def test_one_branch_serves_every_product():
    layer = jax.tree.map(lambda x: x[1], NODE)
    weight, merged = lora.Adapted(W[1], layer), layer.merge(W[1])
    x, ids = normal(3, 4, 6), jnp.array([2, 0])
    assert_close(lora.linear(x, weight), x @ merged)
    assert_close(lora.embed(ids, weight), merged[ids])
    assert_close(lora.linear(normal(3, 4, 5), weight.T), normal(3, 4, 5) @ merged.T)
    assert_close(NODE.merge(W), W + jnp.einsum("li,lo->lio", NODE.u, NODE.v))
    assert_close(NODE.unmerge(NODE.merge(W)), W, atol=1e-6)


def test_shapes_follow_from_axes():
    assert NODE.sizes() == {"stack": (3,), "in": (6,), "out": (5,)} and NODE.stack_ndim == 1
    assert HEADS.sizes() == {"stack": (), "in": (6,), "out": (2, 4)} and HEADS.rank is None
    assert HEADS.as_matrix().v.shape == (8,) and HEADS.as_matrix().layout == lora.Layout()
    assert jax.tree.leaves(NODE.trainable()) == [True, True]
    assert not any(map(jnp.any, jax.tree.leaves(NODE.absent())))


def test_shardings_follow_from_axes():
    placed = HEADS.sharding_specs(P("fsdp", "tensor", None))
    assert placed.u == P("fsdp") and placed.v == P("tensor", None)
    with pytest.raises(ValueError, match="Outer needs whole matrices"):
        NODE.local_specs(P(None, "fsdp", None))
    assert NODE.local_specs(P("stage", None, None)).u == P("stage", None)


def test_a_node_that_does_not_fit_names_both_shapes():
    with pytest.raises(ValueError, match=r"w: .*shape \(3, 6, 5\), the base has \(3, 6, 4\)"):
        NODE.check("w", normal(0, 3, 6, 4))


def test_leaves_that_disagree():
    odd = Outer(u=NODE.u, v=normal(1, 2, 5))
    with pytest.raises(ValueError, match=r"w: Outer: u has \(3,\) along 'stack', v has \(2,\)"):
        odd.check("w", W)


def test_an_unknown_axis():
    with pytest.raises(ValueError, match=r"Odd.u declares an axis 'rnak': expected one of stack"):

        class Odd(Additive):
            u: jax.Array = leaf("stack rnak")


def test_a_leaf_without_axes():
    @flax.struct.dataclass
    class Bare(Additive):
        u: jax.Array

    with pytest.raises(ValueError, match=r"Bare.u declares no axes: write it as leaf"):
        leaves_of(Bare(jnp.ones(3)))


@pytest.mark.sampled
def test_a_leaf_without_a_mirror_is_no_tied_embedding(method):
    layouts = {"w": lora.Layout()}
    delta = lora.lora_transform({"w": normal(0, 8, 9)}, method, targets=".*", key=jax.random.key(0),
                                layouts=layouts)[1]  # fmt: skip
    node = delta["w"]
    if not node.layout.contracted:  # adapted entry by entry, and bound as the sum
        return
    try:
        flipped = node.transposed()
    except ValueError as error:
        assert "cannot adapt a tied embedding" in str(error)
    else:
        weight = normal(0, 8, 9)
        assert_close(flipped.merge(weight.T), node.merge(weight).T)
