"""Whatever arrives, every request ends, in turn, and every page comes back."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.serving.adapters import BaseAlone
from lora_jax.serving.page_allocator import PageAllocator, first_digest, next_digest
from lora_jax.serving.request import Refused, Request
from lora_jax.serving.scheduler import Limits, Scheduler, Sequence

limits = st.builds(
    Limits,
    rows=st.integers(1, 5),
    readers=st.integers(1, 3),
    chunk=st.integers(2, 7),
    page_size=st.integers(1, 5),
    pages=st.integers(4, 20),
    max_waiting=st.just(100),
)


def written(scheduler):
    """Which token each page holds where, by running sequences: none holds two."""
    places = {}
    for sequence in scheduler.running:
        for at in range(sequence.read):
            size = scheduler.limits.page_size
            place = sequence.pages[at // size], at % size
            tokens = tuple(sequence.tokens[: at + 1])
            assert places.setdefault(place, tokens) == tokens


@settings(deadline=None, max_examples=200)
@given(
    limits=limits,
    asked=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(0, 1), st.integers(0, 5)),
        min_size=1,
        max_size=12,
    ),
    cancelled=st.sets(st.integers(0, 11)),
)
def test_every_request_ends_and_no_two_write_one_page(limits, asked, cancelled):
    scheduler, live, ended, steps = Scheduler(limits, BaseAlone()), {}, [], 0

    def step():
        nonlocal steps
        steps += 1
        work = scheduler.plan()
        assert work is not None
        assert len(work.counts) <= (limits.readers if work.is_chunk else limits.rows)
        for sequence, count in work.counts:
            assert 1 <= count <= (limits.chunk if work.is_chunk else 1)
            assert len(sequence.pages) * limits.page_size >= sequence.read + count
        owned = [page for s in scheduler.running for page in s.pages[s.read // limits.page_size :]]
        assert len(owned) == len(set(owned)), "a page that is written has one user"
        for _, sequence in scheduler.advance(work):
            sequence.tokens.append(sequence.ticket)
            if sequence.answered == sequence.request.max_new_tokens:
                scheduler.end(sequence)
                ended.append(live.pop(sequence.ticket).ticket)
        written(scheduler)

    for ticket, (prompt, new, first, pause) in enumerate(asked):
        request = Request(tokens=(first,) * prompt, max_new_tokens=new)
        sequence = Sequence(ticket, request, list(request.tokens))
        try:
            scheduler.submit(sequence)
        except Refused as refused:
            assert refused.reason == "too_long"
            assert prompt + new - 1 > limits.pages * limits.page_size
            continue
        live[ticket] = sequence
        for _ in range(pause):
            if live:
                step()
        if ticket in cancelled and ticket in live:
            scheduler.end(live.pop(ticket))
    while live:
        step()
        assert steps < 10_000
    assert scheduler.plan() is None
    assert scheduler.allocator.available == limits.pages


def test_the_oldest_is_never_preempted():
    limits = Limits(rows=3, readers=3, chunk=4, page_size=2, pages=6, max_waiting=9)
    scheduler = Scheduler(limits, BaseAlone())
    sequences = [
        Sequence(i, Request(tokens=(i, i, i), max_new_tokens=9), [i, i, i]) for i in range(3)
    ]
    order = []
    for sequence in sequences:
        scheduler.submit(sequence)
    while work := scheduler.plan():
        assert scheduler.running[0].ticket == len(order)
        for _, sequence in scheduler.advance(work):
            sequence.tokens.append(7)
            if sequence.answered == 9:
                order.append(sequence.ticket)
                scheduler.end(sequence)
    assert order == [0, 1, 2] and scheduler.preempted


def test_pages_outlive_their_users_until_they_are_wanted():
    pages = PageAllocator(3)
    start = first_digest(None, 0)
    one, two = next_digest(start, [1]), next_digest(next_digest(start, [1]), [2])
    held = pages.allocate(2)
    pages.register(held[0], one)
    pages.register(held[1], two)
    pages.release(held)
    assert pages.available == 3 and pages.find([one, two]) == held
    assert pages.allocate(4) is None
    taken = pages.allocate(2)  # the free one, then the end of the run
    assert pages.find([one, two]) == held[:1]
    pages.retain(held[:1])
    assert pages.allocate(1) is None
    pages.release(taken)
    assert pages.available == 2


def test_digests_tell_adapters_versions_and_orders_apart():
    starts = [first_digest(*start) for start in [(None, 0), ("None", 0), ("a", 0), ("a", 1)]]
    digests = [next_digest(s, tokens) for s in starts for tokens in ([1, 2], [2, 1], [12])]
    assert len(set(digests)) == len(digests)


def test_limits_are_a_value():
    limits = Limits(rows=1, readers=1, chunk=2, page_size=1, pages=1, max_waiting=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        limits.rows = 2
