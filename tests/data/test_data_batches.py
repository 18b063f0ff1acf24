import json
import logging
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data import byte_tokenizer, encode, encode_source, eval_batches, train_batches
from lora_jax.data.packing import next_token_example
from lora_jax.data.records import conversation

TOKENIZER = byte_tokenizer()
OVERHEAD = len(next_token_example(encode(conversation("", "")["messages"], TOKENIZER))["tokens"])


def source_of(lengths):
    return [conversation(chr(65 + i % 26), "x" * n) for i, n in enumerate(lengths)]


def expected_of(source):
    examples = [next_token_example(encode(record["messages"], TOKENIZER)) for record in source]
    return Counter(as_key(example) for example in examples)


def as_key(example):
    fields = ("tokens", "targets", "loss_mask")
    return tuple(tuple(np.asarray(example[field]).tolist()) for field in fields)


def segments(batch):
    """Every segment of a batch, and a check that none leaks into the next."""
    for row in range(len(batch["tokens"])):
        ids = batch["segment_ids"][row]
        used = int((ids > 0).sum())
        assert (ids[:used] > 0).all() and (np.diff(ids[:used]) >= 0).all()
        for segment in range(1, ids.max() + 1):
            inside = ids == segment
            part = {name: array[row][inside] for name, array in batch.items()}
            assert part["positions"].tolist() == list(range(inside.sum()))
            assert part["targets"][:-1].tolist() == part["tokens"][1:].tolist()
            yield part
        for field in ("tokens", "targets", "loss_mask", "positions"):
            assert not batch[field][row][ids == 0].any()


def check_shapes(batch, rows, seq_len):
    for name, array in batch.items():
        assert array.shape == (rows, seq_len)
        assert array.dtype == (bool if name == "loss_mask" else np.int32)
    assert sorted(batch) == ["loss_mask", "positions", "segment_ids", "targets", "tokens"]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=20),
    st.integers(1, 4),
    st.integers(OVERHEAD + 42, 150),
    st.booleans(),
)
def test_packing_loses_nothing_duplicates_nothing_leaks_nothing(lengths, rows, seq_len, pack):
    source = source_of(lengths)
    batches = eval_batches(source, TOKENIZER, batch_size=rows, seq_len=seq_len, pack=pack)
    found: Counter = Counter()
    for batch in batches:
        check_shapes(batch, rows, seq_len)
        found.update(as_key(part) for part in segments(batch))
        assert pack or batch["segment_ids"].max() == 1
    assert found == expected_of(source)


def test_eval_keeps_the_order_and_obeys_the_limit():
    source = source_of([1] * 7)
    batches = eval_batches(source, TOKENIZER, batch_size=2, seq_len=64, limit=3, pack=False)
    prompts = [chr(part["tokens"][6]) for batch in batches for part in segments(batch)]
    assert prompts == ["A", "B", "C"]
    assert not batches[-1]["segment_ids"][1].any()
    again = eval_batches(source, TOKENIZER, batch_size=2, seq_len=64, limit=3, pack=False)
    for one, other in zip(batches, again, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def make_train(**options):
    source = source_of(np.random.default_rng(0).integers(0, 40, 23).tolist())
    options = {"batch_size": 3, "seq_len": 128, "seed": 5} | options
    return train_batches(source, TOKENIZER, **options)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def digest(batches):
    return [{name: array.tolist() for name, array in batch.items()} for batch in batches]


@pytest.mark.parametrize("pack", [True, False])
def test_state_restores_bit_for_bit(pack):
    for consumed in (0, 1, 4, 9):
        iterator = make_train(pack=pack)
        take(iterator, consumed)
        state = json.loads(json.dumps(iterator.get_state()))
        expected = digest(take(iterator, 6))
        resumed = make_train(pack=pack)
        resumed.set_state(state)
        assert digest(take(resumed, 6)) == expected
        assert resumed.get_state() == iterator.get_state()


def test_batches_placed_ahead_keep_the_position_of_the_last_one_taken():
    """As without: the same batches, and the same position after each."""
    plain, placed = make_train(), make_train(place=jax.device_put)
    for _ in range(5):
        batch = next(placed)
        assert all(isinstance(array, jax.Array) for array in batch.values())
        assert digest([batch]) == digest([next(plain)])
        assert placed.get_state() == plain.get_state()
    resumed = make_train(place=jax.device_put)
    resumed.set_state(json.loads(json.dumps(placed.get_state())))
    assert digest(take(resumed, 3)) == digest(take(plain, 3))
    placed.close(), resumed.close()


@pytest.mark.slow
def test_state_restores_in_a_fresh_process():
    iterator = make_train()
    take(iterator, 7)
    script = (
        f"import sys, json; sys.path.insert(0, {__file__.rpartition('/')[0]!r});"
        "from test_data_batches import *; it = make_train();"
        f"it.set_state(json.loads({json.dumps(iterator.get_state())!r}));"
        "print(json.dumps(digest(take(it, 5))))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert json.loads(done.stdout) == digest(take(iterator, 5))


def test_seed_decides_the_order():
    assert digest(take(make_train(), 5)) == digest(take(make_train(), 5))
    assert digest(take(make_train(), 5)) != digest(take(make_train(seed=6), 5))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_an_epoch_over_all_processes_is_every_example_once(processes):
    source = source_of(range(24))
    for epoch in (1, 2):
        seen: Counter = Counter()
        for index in range(processes):
            iterator = train_batches(
                source,
                TOKENIZER,
                batch_size=2,
                seq_len=128,
                seed=1,
                pack=False,
                process_index=index,
                process_count=processes,
            )
            batches = take(iterator, epoch * 12 // processes)
            seen.update(as_key(part) for batch in batches for part in segments(batch))
        expected = {key: epoch for key in expected_of(source)}
        assert seen == expected


def test_epochs_differ_in_order():
    order = [
        as_key(part) for b in take(make_train(pack=False, batch_size=1), 46) for part in segments(b)
    ]
    assert order[:23] != order[23:]
    assert sorted(order[:23]) == sorted(order[23:])


def test_the_shape_is_the_same_for_ever():
    for batch in take(make_train(), 20):
        check_shapes(batch, 3, 128)
        assert batch["loss_mask"].any()
        list(segments(batch))


def test_too_long_examples_are_skipped_counted_and_reported(caplog):
    source = source_of([1, 500, 2, 600])
    with caplog.at_level(logging.WARNING):
        encoded = encode_source(source, TOKENIZER, seq_len=100)
    assert (len(encoded.examples), encoded.skipped) == (2, 2)
    assert "Skipped 2 of 4 examples, longer than the context of 100 tokens" in caplog.text
    caplog.clear()
    assert encode_source(source_of([1]), TOKENIZER, seq_len=100).skipped == 0
    assert not caplog.text


def test_an_example_that_just_fits():
    exact = OVERHEAD + 1 + 10
    assert encode_source(source_of([10]), TOKENIZER, seq_len=exact).skipped == 0
    with pytest.raises(ValueError, match=f"shortest takes {exact}, the longest {exact}: raise"):
        encode_source(source_of([10]), TOKENIZER, seq_len=exact - 1)


def test_bad_sources():
    with pytest.raises(ValueError, match="None of the 2 examples fits a context of 9 tokens"):
        make_two = source_of([50, 60])
        train_batches(make_two, TOKENIZER, batch_size=1, seq_len=9, seed=0)
    with pytest.raises(ValueError, match="The source holds no examples"):
        eval_batches([], TOKENIZER, batch_size=1, seq_len=9)
    with pytest.raises(ValueError, match="Example 1, which begins .*: Nothing to learn"):
        only_user = {"messages": [{"role": "user", "content": "x"}]}
        encode_source([*source_of([1]), only_user], TOKENIZER, seq_len=99)
    with pytest.raises(ValueError, match="2 examples cannot feed 3 processes"):
        train_batches(
            source_of([1, 2]), TOKENIZER, batch_size=1, seq_len=99, seed=0, process_count=3
        )


def test_loss_counts_the_response_alone():
    (batch,) = eval_batches(source_of([4]), TOKENIZER, batch_size=1, seq_len=64)
    targets = batch["targets"][batch["loss_mask"]]
    assert TOKENIZER.decode(targets.tolist()) == "xxxx<|im_end|>"
