"""The protocol of methods and weights holds what later methods need, with no edit to a model.

Each toy below is what a method's own file would be, cut to its bones.
"""

import dataclasses
from typing import Any, ClassVar

import cases
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, moved

import lora_jax as lora
from lora_jax.methods import Additive, DeltaNode, Extra, LowRank, Method
from lora_jax.models import llama
from lora_jax.weights import Shared, dense, linear

CONFIG, PARAMS, TOKENS = cases.llama_case()
FORWARD = jax.jit(llama.forward, static_argnums=2)
KEY = jax.random.key(0)


def transform(method, params=PARAMS, targets=("q_proj", "down_proj")):
    return jax.jit(lambda p: lora.lora_transform(p, method, key=KEY, targets=targets))(params)


def run(delta, base=PARAMS, **kwargs):
    return FORWARD(lora.bind(base, delta, **kwargs), TOKENS, CONFIG)


def all_false(tree):
    return jax.tree.map(lambda _: False, tree)


# DoRA-like: the columns of base + update at a trained length; their norm is not differentiated.
@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyDoRA(Method):
    rank: int = 2

    def fresh(self, weight, *, layout, key):
        low = lora.LoRA(rank=self.rank).fresh(weight, layout=layout, key=key)
        return ColumnScaled(low=low, length=jnp.linalg.norm(dense(weight), axis=-2))


@flax.struct.dataclass
class ColumnScaled(DeltaNode):
    low: LowRank
    length: jax.Array

    @property
    def stack_ndim(self):
        return self.low.stack_ndim

    def factor(self, base):
        norm = jnp.linalg.norm(self.low.merge(base), axis=-2)
        return self.length / jax.lax.stop_gradient(norm)

    def linear(self, x, base, dropout_key):
        y = self.low.linear(x, base, dropout_key)
        return y * jnp.broadcast_to(self.factor(base), y.shape)

    def merge(self, base):
        return self.low.merge(base) * self.factor(base)[..., None, :]

    def unmerge(self, merged):
        raise ValueError("the columns' old lengths are gone: keep the base.")

    def trainable(self):
        return self.replace(low=self.low.trainable(), length=True)


# VeRA-like: one frozen random pair for all targets, stored once; two trained vectors each.
@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyVeRA(Method):
    rank: int = 4

    def fresh(self, weight, *, layout, key):
        stack, d_in, d_out = layout.split(weight.shape)
        return Vectors(d=jnp.full((*stack, self.rank), 0.1), b=jnp.zeros((*stack, *d_out)),
                       d_in=d_in[0])  # fmt: skip

    def extras(self, weights, *, layouts, key):
        shapes = [weight.shape for weight in weights.values()]
        widest = max(shape[-2] for shape in shapes), max(shape[-1] for shape in shapes)
        a, b = jax.random.split(key)
        pair = Pair(a=jax.random.normal(a, (widest[0], self.rank)),
                    b=jax.random.normal(b, (self.rank, widest[1])))  # fmt: skip
        return {"vera": pair}


@flax.struct.dataclass
class Pair(Extra):
    a: jax.Array
    b: jax.Array
    in_weights: ClassVar[bool] = False

    def trainable(self):
        return all_false(self)


@flax.struct.dataclass
class Vectors(Additive):
    d: jax.Array
    b: jax.Array
    pair: Any = None
    d_in: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def stack_ndim(self):
        return self.d.ndim - 1

    def resolve(self, extras):
        return self.replace(pair=Shared(extras["vera"]))

    def halves(self):
        return self.pair.value.a[: self.d_in], self.pair.value.b[:, : self.b.shape[-1]]

    def linear(self, x, base, dropout_key):
        a, b = self.halves()
        inner = (x @ a) * jnp.broadcast_to(self.d, (*x.shape[:-1], self.d.size))
        outer = inner @ b
        return linear(x, base) + outer * jnp.broadcast_to(self.b, outer.shape)

    def update(self, shape):
        a, b = self.halves()
        return jnp.einsum("ir,...r,ro,...o->...io", a, self.d, b, self.b)

    def trainable(self):
        return self.replace(d=True, b=True, pair=all_false(self.pair))


# IA3-like: scales a layer's output.
@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyIA3(Method):
    def fresh(self, weight, *, layout, key):
        stack, _, d_out = layout.split(weight.shape)
        return OutputScale(scale=jnp.ones((*stack, *d_out)))


@flax.struct.dataclass
class OutputScale(DeltaNode):
    scale: jax.Array

    @property
    def stack_ndim(self):
        return self.scale.ndim - 1

    def linear(self, x, base, dropout_key):
        y = linear(x, base)
        return y * jnp.broadcast_to(self.scale, y.shape)

    def merge(self, base):
        return dense(base) * self.scale[..., None, :]

    def unmerge(self, merged):
        return merged / self.scale[..., None, :]

    def trainable(self):
        return self.replace(scale=True)

    def absent(self):
        return self.replace(scale=jnp.ones_like(self.scale))


# Bottleneck-like: an MLP behind a layer, which no single matrix equals.
@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyBottleneck(Method):
    def fresh(self, weight, *, layout, key):
        d_out = weight.shape[-1]
        square = jnp.zeros((*weight.shape[:-2], d_out, d_out))
        low = lora.LoRA(rank=2).fresh(square, layout=layout, key=key)
        return Behind(low=low)


@flax.struct.dataclass
class Behind(DeltaNode):
    low: LowRank

    @property
    def stack_ndim(self):
        return self.low.stack_ndim

    def linear(self, x, base, dropout_key):
        y = linear(x, base)
        return y + jax.nn.relu(y @ self.low.a) @ self.low.b

    def merge(self, base):
        raise ValueError("a bottleneck is not linear: it has no merged form.")

    unmerge = merge

    def trainable(self):
        return self.replace(low=self.low.trainable())


# AdaLoRA-like: singular values under a mask, and statistics that a pure function moves.
@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyAdaLoRA(Method):
    rank: int = 3

    def fresh(self, weight, *, layout, key):
        low = lora.LoRA(rank=self.rank).fresh(weight, layout=layout, key=key)
        e = jnp.zeros(low.scale.shape + (self.rank,))
        b = jnp.broadcast_to(jnp.eye(*low.b.shape[-2:]), low.b.shape)
        return Triplets(low=low.replace(b=b), e=e, mask=jnp.ones_like(e), mean=jnp.zeros_like(e))


@flax.struct.dataclass
class Triplets(Additive):
    low: LowRank
    e: jax.Array
    mask: jax.Array
    mean: jax.Array

    @property
    def stack_ndim(self):
        return self.low.stack_ndim

    def masked(self):
        return self.low.replace(a=self.low.a * (self.e * self.mask)[..., None, :])

    def linear(self, x, base, dropout_key):
        return self.masked().linear(x, base, dropout_key)

    def update(self, shape):
        return self.masked().update(shape)

    def trainable(self):
        return self.replace(low=self.low.trainable(), e=True, mask=False, mean=False)


def prune(delta, gradients, keep):
    """Moves the running mean of |e * gradient|, and masks all but the `keep` largest."""

    def each(node, gradient):
        mean = 0.5 * node.mean + 0.5 * jnp.abs(node.e * gradient.e)
        order = jnp.argsort(jnp.argsort(-mean, axis=-1), axis=-1)
        return node.replace(mean=mean, mask=(order < keep).astype(jnp.float32))

    return jax.tree.map(each, delta, gradients, is_leaf=lambda n: isinstance(n, DeltaNode))


METHODS = {
    "dora": ToyDoRA(),
    "vera": ToyVeRA(),
    "ia3": ToyIA3(),
    "bottleneck": ToyBottleneck(),
    "adalora": ToyAdaLoRA(),
}
MERGEABLE = {name: m for name, m in METHODS.items() if name != "bottleneck"}


@pytest.fixture(scope="module", params=METHODS)
def made(request):
    """A delta, fresh and moved, over the scanned Llama."""
    delta = transform(METHODS[request.param])[1]
    return delta, moved(delta, size=0.5)


@pytest.fixture(scope="module")
def logits():
    return FORWARD(PARAMS, TOKENS, CONFIG)


def test_a_fresh_toy_is_the_identity_in_the_scanned_llama(made, logits):
    assert_close(run(made[0]), logits, rtol=1e-4, atol=1e-5)
    assert np.abs(run(made[1]) - logits).max() > 1e-2


def test_only_what_trains_gets_a_gradient(made):
    gradients = jax.jit(jax.grad(lambda d: (run(d) ** 2).mean()))(made[1])
    received = jax.tree.map(lambda g: bool(np.any(g)), gradients)
    assert received == lora.trainable_mask(made[1])


def test_mask_of_bound_weights(made):
    weights = lora.bind(PARAMS, made[0])
    mask = lora.trainable_mask(weights)
    assert jax.tree.structure(mask) == jax.tree.structure(weights)
    count = [sum(jax.tree.leaves(m)) for m in (mask, lora.trainable_mask(made[0]))]
    assert count[0] == count[1] > 0


def test_stacks_through_vmap(made):
    outputs = jax.jit(jax.vmap(run))(lora.stack(made))
    for output, delta in zip(outputs, made, strict=True):
        assert_close(output, run(delta), rtol=1e-3, atol=2e-5)


def test_rows_use_their_own_adapter(made):
    other = moved(made[0], seed=2, size=0.5)
    together = run(lora.stack([made[1], other]), adapter_ids=jnp.array([1, 0]))
    expected = jnp.stack([run(other)[0], run(made[1])[1]])
    assert_close(together, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", ["dora", "vera"])
def test_remat_changes_no_gradient(name):
    delta = moved(transform(METHODS[name])[1])

    def loss(delta, remat):
        weights = lora.bind(PARAMS, delta)
        return (llama.forward(weights, TOKENS, CONFIG, remat=remat) ** 2).mean()

    plain, again = (jax.jit(jax.grad(loss), static_argnums=1)(delta, r) for r in ("none", "full"))
    assert_close(again, plain, rtol=1e-3, atol=2e-5)


def test_described(made):
    found = lora.describe(PARAMS, made[0])
    assert found.trainable_params > 0 and "trainable params" in str(found)


@pytest.mark.parametrize("name", MERGEABLE)
def test_merged_equals_bound(name):
    delta = moved(transform(METHODS[name])[1])
    merged = lora.merge(PARAMS, delta)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, PARAMS)
    assert_close(FORWARD(merged, TOKENS, CONFIG), run(delta), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", ["vera", "ia3", "adalora"])
def test_unmerge_inverts(name):
    delta = moved(transform(METHODS[name])[1])
    assert_close(lora.unmerge(lora.merge(PARAMS, delta), delta), PARAMS, rtol=1e-3, atol=1e-5)


def test_no_merged_form_names_the_path():
    delta = transform(ToyBottleneck(), targets="down_proj")[1]
    with pytest.raises(ValueError, match="layers/mlp/down_proj: a bottleneck is not linear"):
        lora.merge(PARAMS, delta)


def test_dora_norm_is_not_differentiated():
    w = {"q_proj": cases.normal(0, 6, 5)}
    delta = moved(lora.lora_transform(w, ToyDoRA(), key=KEY)[1])
    node = delta["q_proj"]
    x, factor = cases.normal(1, 3, 6), node.factor(w["q_proj"])

    def fixed(b):
        merged = node.low.replace(b=b).merge(w["q_proj"])
        return jnp.sin(x @ merged * factor[None]).sum()

    gradient = jax.grad(lambda d: jnp.sin(linear(x, lora.bind(w, d)["q_proj"])).sum())(delta)
    assert_close(gradient["q_proj"].low.b, jax.grad(fixed)(node.low.b), rtol=1e-4, atol=1e-5)


def test_vera_pair_is_stored_once_and_stays_out_of_the_weights():
    base, delta = transform(ToyVeRA(), targets=("q_proj", "up_proj"))
    assert set(delta) == {"layers", "vera"}
    assert delta["vera"].a.shape == (16, 4) and delta["vera"].b.shape == (4, 24)
    stored = sum(leaf.size for leaf in jax.tree.leaves(delta["layers"]))
    assert stored == 3 * (2 * 4 + 16 + 24)
    assert set(lora.bind(base, delta)) == set(PARAMS)


def test_vera_formula():
    w = {"q_proj": cases.normal(0, 6, 5)}
    delta = moved(lora.lora_transform(w, ToyVeRA(), key=KEY)[1])
    node, pair, x = delta["q_proj"], delta["vera"], cases.normal(1, 3, 6)
    expected = x @ w["q_proj"] + (((x @ pair.a) * node.d[None]) @ pair.b) * node.b[None]
    assert_close(linear(x, lora.bind(w, delta)["q_proj"]), expected, atol=5e-6)


def test_ia3_and_lora_share_a_tree():
    rules = {"k_proj|v_proj": ToyIA3(), "all-linear": lora.LoRA(rank=2)}
    delta = moved(transform(rules, targets="all-linear")[1])
    kinds = {row.path.split("/")[-1]: row.kind for row in lora.describe(PARAMS, delta).rows}
    assert kinds["k_proj"] == kinds["v_proj"] == "OutputScale" and kinds["q_proj"] == "LowRank"
    merged = FORWARD(lora.merge(PARAMS, delta), TOKENS, CONFIG)
    assert_close(merged, run(delta), rtol=1e-3, atol=2e-5)


def test_absent_ia3_is_one():
    one, both = (transform(ToyIA3(), targets=t)[1] for t in ("k_proj", ["k_proj", "v_proj"]))
    member = lora.unstack(lora.stack([moved(one), moved(both)]))[0]
    assert_close(run(member), run(moved(one)), rtol=1e-4, atol=1e-5)


def test_methods_without_a_neutral_value_say_so():
    one, both = (transform(ToyDoRA(), targets=t)[1] for t in ("k_proj", ["k_proj", "v_proj"]))
    with pytest.raises(ValueError, match="ColumnScaled has no neutral value"):
        lora.stack([one, both])


def test_adalora_prunes_between_steps():
    delta = moved(transform(ToyAdaLoRA())[1])
    gradient = jax.jit(jax.grad(lambda d: (run(d) ** 2).mean()))
    gradients = gradient(delta)
    pruned = jax.jit(prune, static_argnums=2)(delta, gradients, 1)
    for node in jax.tree.leaves(pruned, is_leaf=lambda n: isinstance(n, DeltaNode)):
        np.testing.assert_array_equal(node.mask.sum(-1), 1)
    rank = np.linalg.matrix_rank(pruned["layers"]["attn"]["q_proj"].update((3, 16, 16)), tol=1e-5)
    np.testing.assert_array_equal(rank, 1)
    again = gradient(pruned)["layers"]["attn"]["q_proj"]
    masked = pruned["layers"]["attn"]["q_proj"].mask == 0
    assert not np.any(np.asarray(again.e)[masked])


def test_a_method_that_cannot_adapt_a_table_says_so():
    tied, params, _ = cases.llama_case(tie_embeddings=True)
    delta = transform(ToyIA3(), params, targets="embed")[1]
    with pytest.raises(ValueError, match="OutputScale cannot adapt an embedding"):
        llama.forward(lora.bind(params, delta), TOKENS, tied)
    with pytest.raises(ValueError, match="OutputScale cannot adapt a tied embedding"):
        llama.output_head(lora.bind(params, delta))
