"""The chunked loss against the cross-entropy of all logits at once."""

import itertools

import cases
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from cases import assert_close

import lora_jax as lora
from lora_jax import parallel
from lora_jax.models import llama
from lora_jax.training import token_losses
from lora_jax.training.losses.token_log_probs import token_log_probs
from lora_jax.weights import linear, transpose

HIDDEN = cases.normal(0, 2, 7, 6)
TARGETS = jnp.asarray(np.random.default_rng(1).integers(0, 11, (2, 7)), jnp.int32)
MASK = jnp.asarray(np.random.default_rng(2).random((2, 7)) < 0.6)
TABLE = cases.normal(3, 11, 6)


def naive(hidden, head, targets=TARGETS, mask=MASK):
    losses = -jax.nn.log_softmax(linear(hidden, head).astype(jnp.float32))
    picked = jnp.take_along_axis(losses, targets[..., None], axis=-1)[..., 0]
    return jnp.where(mask, picked, 0).sum()


def chunked(hidden, head, chunk=4, targets=TARGETS, mask=MASK):
    return token_losses(hidden, head, targets, mask, chunk=chunk)[0]


def lora_of(name, tree):
    base, delta = lora.lora_transform(tree, lora.LoRA(rank=2), targets=name, key=jax.random.key(0))
    return base, cases.moved(delta)


HEAD_BASE, HEAD_DELTA = lora_of("lm_head", {"lm_head": TABLE.T})
TIED_BASE, TIED_DELTA = lora_of("embed", {"embed": TABLE})
HEADS = {
    "array": (TABLE.T, lambda head: head),
    "tied": (TABLE, transpose),
    "lora": (HEAD_DELTA, lambda delta: lora.bind(HEAD_BASE, delta)["lm_head"]),
    "lora_tied": (TIED_DELTA, lambda delta: transpose(lora.bind(TIED_BASE, delta)["embed"])),
}


@pytest.fixture(params=HEADS)
def head(request):
    """What is trained of a head, and the head made of it."""
    return HEADS[request.param]


@pytest.mark.sampled
@pytest.mark.parametrize("chunk", [1, 4, 14, 100])
def test_value_at_any_chunk(chunk):
    total, count = token_losses(HIDDEN, TABLE.T, TARGETS, MASK, chunk=chunk)
    assert np.isclose(total, naive(HIDDEN, TABLE.T), rtol=1e-5)
    assert int(count) == int(MASK.sum()) and total.dtype == count.dtype == jnp.float32


@pytest.mark.sampled
@pytest.mark.parametrize("chunk", [3, 14])
def test_gradients(head, chunk):
    trained, make = head

    def ours(hidden, t):
        return chunked(hidden, make(t), chunk), ()

    def theirs(hidden, t):
        return naive(hidden, make(t)), ()

    assert_close(*both_ways(ours, theirs, trained), rtol=1e-4, atol=1e-5)


@pytest.mark.sampled
def test_gradient_of_hidden_alone(head):
    trained, make = head
    ours = jax.jit(jax.grad(lambda h: 3 * chunked(h, make(trained))))(HIDDEN)
    theirs = jax.jit(jax.grad(lambda h: 3 * naive(h, make(trained))))(HIDDEN)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not np.any(np.asarray(ours)[~np.asarray(MASK)])


@pytest.mark.sampled
def test_gradient_of_the_head_alone(head):
    trained, make = head
    ours = jax.jit(jax.grad(lambda t: chunked(HIDDEN, make(t))))(trained)
    theirs = jax.jit(jax.grad(lambda t: naive(HIDDEN, make(t))))(trained)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1])
def test_hardly_any_position_counts(count):
    mask = jnp.zeros((2, 7), bool).at[1, 3].set(bool(count))
    ours = jax.jit(jax.value_and_grad(lambda h, mask: chunked(h, TABLE.T, 3, mask=mask)))
    theirs = jax.jit(jax.value_and_grad(lambda h, mask: naive(h, TABLE.T, mask=mask)))
    assert_close(ours(HIDDEN, mask), theirs(HIDDEN, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [4, 5, 64])
def test_a_position_that_does_not_count_may_hold_anything(length):
    """Not even a value that overflows reaches the sum or its gradients."""
    hidden = HIDDEN.at[0, 0].set(jnp.inf)
    mask = MASK.at[0, 0].set(False)
    ours = jax.jit(jax.value_and_grad(lambda t: chunked(hidden, t, length, mask=mask)))
    loss, gradient = ours(TABLE.T)
    expected = jax.jit(jax.grad(lambda t: naive(HIDDEN, t, mask=mask)))(TABLE.T)
    assert np.isfinite(loss)
    assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_under_vmap():
    deltas = lora.stack([HEAD_DELTA, cases.moved(HEAD_DELTA, 5)])
    make = HEADS["lora"][1]

    def gradients(loss):
        return jax.vmap(jax.value_and_grad(lambda d: loss(HIDDEN, make(d))))(deltas)

    assert_close(gradients(chunked), gradients(naive), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_under_vmap_of_every_input():
    masks, hidden = jnp.stack([MASK, ~MASK]), jnp.stack([HIDDEN, -HIDDEN])

    def gradients(loss):
        def each(h, m):
            return jax.value_and_grad(lambda h: loss(h, TABLE.T, mask=m))(h)

        return jax.vmap(each)(hidden, masks)

    assert_close(gradients(chunked), gradients(naive), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_bf16_hidden_and_head():
    hidden, table = HIDDEN.astype(jnp.bfloat16), TABLE.T.astype(jnp.bfloat16)
    ours = jax.value_and_grad(chunked, argnums=(0, 1))(hidden, table)
    theirs = jax.value_and_grad(naive, argnums=(0, 1))(hidden, table)
    assert ours[0].dtype == jnp.float32
    assert {leaf.dtype for leaf in ours[1]} == {jnp.dtype("bfloat16")}
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        assert np.abs(one - other).max() <= 0.02 * np.abs(other).max()


@pytest.mark.slow
def test_large_logits_do_not_overflow():
    assert np.isclose(chunked(1e3 * HIDDEN, TABLE.T), naive(1e3 * HIDDEN, TABLE.T), rtol=1e-5)


def test_each_chunk_drops_anew():
    """Of equal rows: one mask for all chunks would give each chunk the same loss."""
    table = {"lm_head": cases.normal(0, 6, 9)}
    base, delta = lora.lora_transform(
        table, lora.LoRA(rank=2, dropout=0.5), targets="lm_head", key=jax.random.key(0)
    )
    weights = lora.bind(base, cases.moved(delta), dropout_key=jax.random.key(1))
    hidden = jnp.broadcast_to(cases.normal(1, 6), (1, 8, 6))
    targets, counted = jnp.zeros((1, 8), jnp.int32), jnp.arange(8)[None]

    @jax.jit
    def loss(count):
        return token_losses(hidden, weights["lm_head"], targets, counted < count, chunk=2)[0]

    sums = [float(loss(count)) for count in (0, 2, 4, 6, 8)]
    assert len({round(after - before, 4) for before, after in itertools.pairwise(sums)}) == 4


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_rows_adapt_differently(tied):
    table = {"embed": cases.normal(0, 9, 6)} if tied else {"lm_head": cases.normal(0, 6, 9)}
    base, delta = lora.lora_transform(
        table, lora.LoRA(rank=2), targets=next(iter(table)), key=jax.random.key(0)
    )
    weights = lora.bind(base, lora.stack([delta, delta]), adapter_ids=jnp.array([0, 1]))
    hidden, ids = cases.normal(1, 2, 4, 6), jnp.zeros((2, 4), jnp.int32)
    with pytest.raises(ValueError, match="an adapter for each row.*leave the head"):
        token_losses(hidden, llama.output_head(weights), ids, ids == 0)


def naive_log_probs(hidden, head, mask=MASK):
    log_probs = jax.nn.log_softmax(linear(hidden, head).astype(jnp.float32))
    picked = jnp.take_along_axis(log_probs, TARGETS[..., None], axis=-1)[..., 0]
    return jnp.where(mask, picked, 0)


def both_ways(ours, theirs, trained):
    """Values, auxiliary ones included, and gradients of two losses."""
    for loss in (ours, theirs):
        gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        yield gradients(HIDDEN, trained)


def weighed(log_probs):
    """A loss of rows that weighs each position by all others of its row."""
    return (log_probs.sum(-1) ** 2).sum() + (jnp.sin(log_probs) * HIDDEN[..., 0]).sum()


@pytest.mark.sampled
@pytest.mark.parametrize("chunk", [3, 100])
def test_log_probabilities_by_position(head, chunk):
    """In value, and in gradient through a loss in which positions weigh differently."""
    trained, make = head

    def ours(hidden, t):
        found = token_log_probs(hidden, make(t), TARGETS, MASK, chunk=chunk)
        return weighed(found), found

    def theirs(hidden, t):
        found = naive_log_probs(hidden, make(t))
        return weighed(found), found

    assert_close(*both_ways(ours, theirs, trained), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [3, 100])
def test_log_probabilities_under_a_frozen_head_need_no_second_product(chunk):
    """Whose gradient by the rows comes with the logits: in value, gradient, and products."""

    def ours(hidden):
        return weighed(token_log_probs(hidden, TABLE.T, TARGETS, MASK, chunk=chunk))

    def theirs(hidden):
        return weighed(naive_log_probs(hidden, TABLE.T))

    both = (jax.jit(jax.value_and_grad(loss))(HIDDEN) for loss in (ours, theirs))
    assert_close(*both, rtol=1e-4, atol=1e-5)
    assert len(jaxprs.of("dot_general", jax.grad(ours), HIDDEN)) == 2  # logits, and back to rows


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1])
def test_log_probabilities_where_hardly_any_counts(count):
    mask = jnp.zeros((2, 7), bool).at[1, 3].set(bool(count))
    hidden = HIDDEN.at[0, 0].set(jnp.inf)  # which counts for nothing

    def ours(t):
        return token_log_probs(hidden, t, TARGETS, mask, chunk=3).sum()

    theirs = jax.value_and_grad(lambda t: naive_log_probs(HIDDEN, t, mask).sum())
    assert_close(jax.value_and_grad(ours)(TABLE.T), theirs(TABLE.T), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_log_probabilities_over_a_mesh():
    hidden, mask = cases.normal(5, 4, 8, 6), jnp.arange(8)[None] < jnp.array([[8], [3], [0], [5]])
    targets = jnp.arange(32).reshape(4, 8) % 11

    def loss(hidden, table):
        found = token_log_probs(hidden, table, targets, mask, chunk=3)
        return (found.sum(-1) ** 2).sum(), found

    gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    of_rows = jax.grad(loss, has_aux=True)  # under a frozen head
    alone = jax.jit(gradients)(hidden, TABLE.T)
    mesh = parallel.make_mesh({"fsdp": 2, "sequence": 4})
    with jax.set_mesh(mesh):
        placed = jax.device_put(hidden, parallel.batch_sharding(mesh))
        together = jax.jit(gradients)(placed, TABLE.T)
        frozen, _ = jax.jit(of_rows)(placed, TABLE.T)
    assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert_close(frozen, alone[1][0], rtol=1e-4, atol=1e-5)


def capped(rows, head):
    return 2 * jnp.tanh(linear(rows, head) / 2)


@pytest.mark.sampled
@pytest.mark.parametrize("chunk", [3, 100])
def test_logits_that_are_more_than_the_product(head, chunk):
    trained, make = head

    def ours(hidden, t):
        given = (hidden, make(t), TARGETS, MASK)
        total, _ = token_losses(*given, chunk=chunk, read_out=capped)
        return total, token_log_probs(*given, chunk=chunk, read_out=capped)

    def theirs(hidden, t):
        log_probs = jax.nn.log_softmax(capped(hidden, make(t)))
        picked = jnp.take_along_axis(log_probs, TARGETS[..., None], axis=-1)[..., 0]
        return -jnp.where(MASK, picked, 0).sum(), jnp.where(MASK, picked, 0)

    assert_close(*both_ways(ours, theirs, trained), rtol=1e-4, atol=1e-5)
