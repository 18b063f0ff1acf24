"""Few programs, and one for every step."""

from hypothesis import given
from hypothesis import strategies as st

from lora_jax.serving import Lease, Place
from lora_jax.serving.request import Request
from lora_jax.serving.scheduler import Limits, Sequence, Work
from lora_jax.serving.shapes import all_shapes, batch_of, sampling_of, shape_of

WIDTHS = (1, 2, 4)


@given(st.data())
def test_every_step_has_a_shape_that_holds_it(data):
    def draw(lowest, highest):
        return data.draw(st.integers(lowest, highest))

    limits = Limits(
        rows=draw(1, 40), readers=1, chunk=draw(2, 9), page_size=draw(1, 64), pages=9, max_waiting=1
    )
    max_length, is_chunk = draw(2, 3000), draw(0, 1) == 1
    counts = []
    for ticket in range(draw(1, limits.readers if is_chunk else limits.rows)):
        count = draw(1, min(limits.chunk, max_length)) if is_chunk else 1
        length = draw(count, max_length)
        request = Request(tokens=tuple(range(length)))
        lease = Lease("", Place(tuple(range(draw(0, 4))), ticket))
        pages = list(range(-(-length // limits.page_size)))
        sequence = Sequence(ticket, request, list(request.tokens), pages=pages, lease=lease)
        sequence.read = length - count
        counts.append((sequence, count))
    work = Work(counts, is_chunk)
    shapes = all_shapes(limits, max_length, WIDTHS)
    assert len(shapes) == len(set(shapes)) <= 3 * 8 * 14
    shape = shape_of(work, limits, max_length, WIDTHS)
    assert shape in shapes
    batch, how = batch_of(work, shape), sampling_of(work, shape.rows)
    for row, (sequence, count) in enumerate(counts):
        assert batch.tokens[row, :count].tolist() == sequence.tokens[sequence.read :]
        assert batch.table[row].tolist()[: len(sequence.pages)] == sequence.pages
        assert set(batch.adapter_pages[row].tolist()) <= {-1, *sequence.lease.place.pages}
        assert batch.adapter_slots[row] == row
    assert batch.counts.sum() == sum(count for _, count in counts)
    assert how.step.tolist() == [0] * shape.rows


def test_programs_of_a_real_engine_are_few():
    limits = Limits(rows=32, readers=4, chunk=64, page_size=16, pages=512, max_waiting=1)
    shapes = all_shapes(limits, 2048, (1,))
    assert sorted({shape.rows for shape in shapes}) == [1, 4, 8, 16, 32]
    assert sorted({shape.columns for shape in shapes}) == [8, 16, 32, 64, 128]
    assert len(shapes) == 35
