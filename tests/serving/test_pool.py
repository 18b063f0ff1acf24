"""The pool: whatever comes and goes, who holds a lease gets the adapter that it asked for."""

import functools
import re

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax as lora
from lora_jax import serving
from lora_jax.weights import scan_layers

ROWS, PAGES, SLOTS = 4, 6, 3
X = np.random.default_rng(0).standard_normal((ROWS, 2, 16)).astype(np.float32)


@functools.cache
def base():
    return {
        "layers": {"q_proj": cases.normal(1, 2, 16, 24), "down_proj": cases.normal(2, 2, 24, 16)}
    }


def apply(weights, x):
    def layer(x, w):
        return x + lora.linear(jnp.tanh(lora.linear(x, w["q_proj"])), w["down_proj"]), None

    return scan_layers(layer, x, weights["layers"])[0]


def new_pool(pages=PAGES, slots=SLOTS, **changes):
    bank = serving.make_bank(
        base(), pages=pages, slots=slots, page_size=4, widest=16, post="all-linear", **changes
    )
    return serving.Pool(base(), bank)


@functools.cache
def adapters():
    """Deltas of 0 to 4 pages, and what each gives alone."""
    made = [
        (lora.LoRA(rank=1), "q_proj"),
        (lora.LoRA(rank=7), "all-linear"),
        (lora.LoRA(rank=16), "down_proj"),
        (lora.DoRA(rank=9), "all-linear"),
        (lora.IA3(), "q_proj"),
    ]
    deltas = [
        cases.moved(lora.lora_transform(base(), m, targets=t, key=jax.random.key(0))[1], seed=i)
        for i, (m, t) in enumerate(made)
    ]
    return deltas, [np.asarray(apply(lora.bind(base(), delta), X)) for delta in deltas]


@functools.cache
def run(slots):
    del slots  # part of a bank's shapes

    @jax.jit
    @chex.assert_max_traces(n=1)
    def served(bank, rows):
        return apply(serving.bind(base(), bank, rows), X)

    return served


def assert_leases_are_right(pool, held):
    """Each of `held`, pairs of a lease and the number of its delta, gives what that gives alone."""
    held = held[-ROWS:]
    places = [lease.place for lease, _ in held] + [None] * (ROWS - len(held))
    y = run(pool.bank.slots)(pool.bank, serving.rows_of(places, width=4))
    alone = np.asarray(apply(base(), X))
    for row in range(ROWS):
        expected = adapters()[1][held[row][1]] if row < len(held) else alone
        np.testing.assert_allclose(y[row], expected[row], rtol=0, atol=2e-5)


NAMES = ("ann", "bob", "cem", "dua")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from(NAMES), st.integers(0, 4)),
        st.tuples(st.just("acquire"), st.sampled_from(NAMES), st.just(0)),
        st.tuples(st.just("acquire"), st.sampled_from(NAMES), st.just(0)),
        st.tuples(st.just("release"), st.just(""), st.integers(0, 7)),
        st.tuples(st.just("remove"), st.sampled_from(NAMES), st.just(0)),
    ),
    max_size=25,
)


def assert_consistent(pool, held):
    """Every page and slot is free, idle or used, and once."""
    versions = {lease.version: lease for lease, _ in held}
    versions |= {version.number: version for version in pool._idle}
    places = [version.place for version in versions.values()]
    pages = [page for place in places for page in place.pages] + pool._pages
    slots = [place.slot for place in places] + pool._slots
    assert sorted(pages) == [*range(PAGES)] and sorted(slots) == [*range(SLOTS)]
    in_use = {lease.version for lease, _ in held}
    assert not in_use & {version.number for version in pool._idle}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(STEPS)
def test_in_any_order_each_lease_keeps_its_adapter(steps):
    pool, known, held = new_pool(), {}, []
    for step, name, number in steps:
        if step == "add":
            pool.add(name, adapters()[0][number])
            known[name] = number
        elif step == "acquire" and name in known:
            in_use = {lease.version: lease.place for lease, _ in held}
            try:
                held.append((pool.acquire(name), known[name]))
            except serving.BankFull:
                used = sum(len(place.pages) for place in in_use.values())
                wanted = len(pool._named[name].adapter.pages)
                assert used + wanted > PAGES or len(in_use) == SLOTS
        elif step == "release" and held:
            pool.release(held.pop(number % len(held))[0])
        elif step == "remove" and name in known:
            pool.remove(name)
            del known[name]
        assert_consistent(pool, held)
    assert set(pool.names) == set(known)
    assert_leases_are_right(pool, held)


def test_the_one_released_longest_ago_makes_room():
    pool = new_pool(slots=2)
    for number, name in enumerate(("ann", "bob", "cem")):
        pool.add(name, adapters()[0][0 if number else 4])
    ann, bob = pool.acquire("ann"), pool.acquire("bob")
    pool.release(bob)
    pool.release(ann)
    assert pool.resident == ("ann", "bob")
    place = ann.place
    again = pool.acquire("ann")
    assert again.place == place  # it was still there
    cem = pool.acquire("cem")
    assert pool.resident == ("ann", "cem")
    refuses("'bob' needs 1 pages and a slot, and adapters in use", pool.acquire, "bob")
    assert_leases_are_right(pool, [(again, 4), (cem, 0)])
    pool.release(cem)
    assert_leases_are_right(pool, [(again, 4), (pool.acquire("bob"), 0)])


def test_one_adapter_has_many_users_and_one_place():
    pool = new_pool()
    pool.add("ann", adapters()[0][1])
    leases = [pool.acquire("ann") for _ in range(20)]
    assert len({lease.place for lease in leases}) == 1
    for lease in leases:
        pool.release(lease)
    refuses("this use of 'ann' was released before", pool.release, leases[0])


def test_thousands_pass_through_a_small_bank():
    pool = new_pool(dtype=jnp.bfloat16)
    for i in range(2000):
        pool.add(f"adapter {i}", adapters()[0][0])
    assert pool.nbytes == 2000 * (2 * 4 * (16 + 24) * 2)
    for i in range(0, 2000, 100):
        pool.release(pool.acquire(f"adapter {i}"))
    assert len(pool.names) == 2000 and len(pool.resident) == SLOTS


def refuses(message, f, *arguments):
    with pytest.raises(ValueError, match=re.escape(message)):
        f(*arguments)


def test_a_refused_replacement_leaves_the_former_adapter():
    pool = new_pool()
    pool.add("ann", adapters()[0][0])
    wide = lora.lora_transform(base(), lora.LoRA(rank=16), key=jax.random.key(0))[1]
    bound_for_16 = serving.Pool(base(), new_pool(pages=3).bank)
    refuses("ann: an adapter of 4 pages does not fit a bank of 3", bound_for_16.add, "ann", wide)
    scales = lora.lora_transform(base(), lora.IA3(scales="input"), key=jax.random.key(0))[1]
    refuses("the adapter scales inputs", pool.add, "ann", scales)
    assert_leases_are_right(pool, [(pool.acquire("ann"), 0)])
    refuses("there is no adapter 'bob'", pool.acquire, "bob")
    refuses("there is no adapter 'bob'", pool.remove, "bob")
