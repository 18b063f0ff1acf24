"""An engine answers each request as if it were alone, and compiles nothing whatever arrives."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_models import (
    ANSWER,
    GEMMA,
    LLAMA,
    PROMPT,
    VOCAB,
    Alone,
    StackPool,
    adapters_of,
    model_of,
)

from lora_jax import parallel
from lora_jax.models import decoder
from lora_jax.serving import Engine, Refused, Request, Sampling
from lora_jax.serving.shapes import Shape

SIZES = dict(rows=4, page_size=4, pages=14, chunk=5, readers=4, max_length=PROMPT + ANSWER)


class Served:
    """A model, an engine over it with everything compiled, and what is right."""

    def __init__(self, config, *, quantized=False, slots=2):
        self.model = model_of(config, quantized=quantized)
        self.deltas = adapters_of(self.model)
        self.pool = StackPool(self.deltas, slots)
        self.engine = Engine(self.model, self.pool, **SIZES)
        self.programs = self.engine.warm_up()
        self.alone = Alone(self.model, self.deltas)


@functools.cache
def served_model(name):
    with jax.numpy_dtype_promotion("strict"):
        return Served(GEMMA if "gemma2" in name else LLAMA, quantized="nf4" in name)


@pytest.fixture(params=["llama", "gemma2 of nf4"])
def served(request):
    return served_model(request.param)


@pytest.fixture
def llama():
    return served_model("llama")


def run(engine, events=None):
    """Steps until nothing is left: `{ticket: events}`."""
    events = {} if events is None else events
    while not engine.idle:
        for event in engine.step():
            events.setdefault(event.ticket, []).append(event)
    return events


def tokens_of(events):
    return [token for event in events for token in event.tokens]


def text_of(events):
    return "".join(event.text for event in events)


def ask(engine, **values):
    """The events of one request."""
    ticket = engine.submit(Request(**values))
    return run(engine)[ticket]


token = st.integers(0, 255)
# Few beginnings, so that some are shared.
prompts = st.builds(
    lambda start, rest: tuple([start] * 9 + rest)[:PROMPT],
    st.integers(0, 1),
    st.lists(token, max_size=PROMPT - 9),
) | st.lists(token, min_size=1, max_size=PROMPT).map(tuple)
arrivals = st.lists(
    st.tuples(
        prompts,
        st.sampled_from([None, "a0", "a1", "a2"]),
        st.integers(1, ANSWER),
        st.integers(0, 12),  # steps before the next arrival
        st.none() | st.integers(0, 30),  # steps after which it is cancelled
    ),
    min_size=1,
    max_size=12,
)


@settings(
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
    derandomize=True,
)
@given(arrivals=arrivals)
def test_every_request_gets_what_it_would_get_alone(served, arrivals):
    engine, events, asked, cancelled = served.engine, {}, {}, set()
    compilations = count_compilations()
    due, step = [], 0

    def one_step():
        nonlocal step
        for event in engine.step():
            events.setdefault(event.ticket, []).append(event)
        step += 1
        for ticket in [ticket for ticket, at in due if at <= step]:
            if engine.cancel(ticket):
                cancelled.add(ticket)
        due[:] = [(ticket, at) for ticket, at in due if at > step]

    for tokens, adapter, count, pause, cancel in arrivals:
        ticket = engine.submit(Request(tokens=tokens, adapter=adapter, max_new_tokens=count))
        asked[ticket] = tokens, adapter, count
        if cancel is not None:
            due.append((ticket, step + cancel))
        for _ in range(pause):
            one_step()
    while not engine.idle:
        one_step()
        assert step < 2000, "no end"

    assert compilations() == 0
    assert engine.stats()["programs"] == served.programs
    assert engine.stats()["pages_used"] == 0 and not served.pool.used
    for ticket, (tokens, adapter, count) in asked.items():
        expected, got = served.alone(tokens, adapter, count), tokens_of(events[ticket])
        finishes = [event.finish for event in events[ticket] if event.finish]
        if ticket in cancelled:
            assert finishes == ["cancelled"] and got == expected[: len(got)]
            continue
        assert got == expected
        stopped = expected[-1] == served.model.tokenizer.eos_id
        assert finishes == ["stop" if stopped else "length"]
        said = got[:-1] if stopped else got
        plain = served.model.tokenizer.decode(said, skip_special_tokens=True)
        assert text_of(events[ticket]) == plain


def count_compilations():
    """A function that returns how often XLA has compiled since."""
    found = []

    def listen(name, *_, **__):
        if name == "/jax/core/compile/backend_compile_duration":
            found.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: len(found)


def test_compilations_are_counted():
    compilations = count_compilations()
    jax.jit(lambda x: x * 3.125 + compilations())(jnp.ones(3))
    assert compilations()


def test_pages_run_out_and_are_read_again(llama):
    before = llama.engine.stats()["preempted"]
    prompts = [tuple(range(i, i + 12)) for i in range(4)]
    tickets = [
        llama.engine.submit(Request(tokens=p, max_new_tokens=ANSWER, ignore_eos=True))
        for p in prompts
    ]
    events = run(llama.engine)
    assert llama.engine.stats()["preempted"] > before
    for ticket, prompt in zip(tickets, prompts, strict=True):
        got = tokens_of(events[ticket])
        expected = llama.alone(prompt, None, ANSWER)
        assert len(got) == ANSWER and got[: len(expected)] == expected


def test_prefixes_are_shared_within_one_version_of_one_adapter(llama):
    prompt = tuple(range(100, 123))

    def shared(adapter, tokens=prompt):
        return ask(llama.engine, tokens=tokens, adapter=adapter, max_new_tokens=1)[0].shared_tokens

    assert shared("a0") == 0
    assert shared("a0") == 20  # five full pages
    assert shared("a0", prompt[:20]) == 16  # one token at least is read
    assert shared("a0", (*prompt[:9], 0, *prompt[10:])) == 8
    assert shared(None) == 0 and shared("a1") == 0
    llama.pool.versions["a0"] += 1
    assert shared("a0") == 0


def test_prompts_do_not_stall_answers(llama):
    engine = llama.engine
    first = engine.submit(Request(tokens=(1,), max_new_tokens=8, ignore_eos=True))
    engine.step()
    engine.submit(Request(tokens=tuple(range(24)), max_new_tokens=1))
    said = [any(event.ticket == first for event in engine.step()) for _ in range(6)]
    assert sum(said) == 3
    run(engine)


def test_samples_depend_on_the_seed_and_the_request_alone(llama):
    sampling = Sampling(temperature=1.3, top_p=0.9, top_k=50, seed=-7)
    wish = dict(tokens=(5, 6, 7), max_new_tokens=12, sampling=sampling, ignore_eos=True)
    alone = tokens_of(ask(llama.engine, **wish))
    assert alone == tokens_of(ask(llama.engine, **wish))
    others = [
        Request(tokens=tuple(range(i, i + 11)), adapter=f"a{i % 2}", max_new_tokens=14)
        for i in range(5)
    ]
    for other in others[:3]:
        llama.engine.submit(other)
    ticket = llama.engine.submit(Request(**wish))
    for other in others[3:]:
        llama.engine.submit(other)
    assert tokens_of(run(llama.engine)[ticket]) == alone
    seeded = [
        tokens_of(ask(llama.engine, **wish | {"sampling": Sampling(temperature=1.3, seed=seed)}))
        for seed in (0, 1, 2**32, -1)
    ]
    assert len(set(map(tuple, seeded))) == 4


def test_stop_strings_end_an_answer_before_them(llama):
    wish = dict(tokens=(65, 66), max_new_tokens=ANSWER, ignore_eos=True)
    free = ask(llama.engine, **wish)
    text = text_of(free)
    stop = text[3:5]
    events = ask(llama.engine, **wish, stop=("never", stop))
    assert text_of(events) == text[: text.find(stop)]
    assert events[-1].finish == "stop"
    assert len(tokens_of(events)) < ANSWER


def test_logprobs_are_the_models(llama):
    events = ask(llama.engine, tokens=(3, 1, 4), max_new_tokens=3, logprobs=2, ignore_eos=True)
    row = [3, 1, 4, *tokens_of(events)]
    logits = decoder.forward(llama.model.params, jnp.array([row]), LLAMA)[0]
    expected = np.asarray(jax.nn.log_softmax(logits))
    for place, event in enumerate(events):
        (said,) = event.logprobs
        at = expected[2 + place]
        assert said.token == row[3 + place] == said.top[0][0] and len(said.top) == 2
        assert said.logprob == pytest.approx(at[said.token], abs=1e-4)
        for token, logprob in said.top:
            assert logprob == pytest.approx(at[token], abs=1e-4)
    (event,) = ask(llama.engine, tokens=(3,), max_new_tokens=1, logprobs=0)
    assert event.logprobs[0].top == ()
    (event,) = ask(llama.engine, tokens=(3,), max_new_tokens=1)
    assert event.logprobs == ()


def test_what_is_not_a_number_stays_in_its_row():
    model = model_of(LLAMA)
    deltas = adapters_of(model, 2)
    deltas["a1"] = jax.tree.map(lambda leaf: leaf * jnp.nan, deltas["a1"])
    engine = Engine(model, StackPool(deltas), **{**SIZES, "pages": 8})
    for _ in range(2):  # every page is used by the bad one, then by a good one
        bad = ask(engine, tokens=tuple(range(20)), adapter="a1", max_new_tokens=8)
        assert [event.finish for event in bad] == ["failed"]
        prompt = tuple(range(3, 24))
        good = ask(engine, tokens=prompt, adapter="a0", max_new_tokens=8)
        assert tokens_of(good) == served_model("llama").alone(prompt, "a0", 8)


def test_an_adapter_that_is_gone_fails_its_waiting_requests(llama):
    held = [
        llama.engine.submit(Request(tokens=(i,), adapter="a1", max_new_tokens=9)) for i in range(5)
    ]
    llama.engine.step()
    version = llama.pool.versions.pop("a1")
    events = run(llama.engine)
    llama.pool.versions["a1"] = version
    finishes = [events[ticket][-1].finish for ticket in held]
    assert finishes.count("failed") == 1 and finishes[-1] == "failed"


BAD = {
    "tokens": [
        (),
        None,
        "ab",
        (1.5,),
        (True,),
        (-1,),
        (VOCAB,),
        (2**70,),
        (1,) * 40,
        (1,) * 10_000,
    ],
    "max_new_tokens": [0, -1, 40, 10**5000, 1.0, None, True],
    "temperature": [-0.1, float("nan"), float("inf"), 1e9, 10**5000, None, "1", 1j],
    "top_p": [-0.1, 10**5000, 1.1, float("nan"), None],
    "top_k": [-1, -(10**5000), 2**31, 0.5],
    "seed": [2**63, -(2**63) - 1, 0.5, None],
    "stop": [("",), "x" * 5000, ("x" * 5000,), (1,), ("a",) * 17, (10**5000,) * 17],
    "logprobs": [-1, 21, 1.5, True],
    "adapter": ["nobody", 3, "", ("a",)],
    "ignore_eos": [1],
}


@pytest.mark.parametrize("field", BAD)
def test_bad_requests_are_refused_with_the_field(llama, field):
    for value in BAD[field]:
        wish = {"tokens": (1, 2), "max_new_tokens": 2}
        in_sampling = hasattr(Sampling(), field)
        changed = {"sampling": Sampling(**{field: value})} if in_sampling else {field: value}
        with pytest.raises(Refused) as refused:
            llama.engine.submit(Request(**wish | changed))
        assert refused.value.field == field, value
        assert refused.value.reason in ("invalid", "too_long", "unknown_adapter")
        assert len(str(refused.value)) < 250
    assert llama.engine.idle


def test_a_full_queue_and_a_request_without_room_are_refused(llama):
    engine = Engine(llama.model, rows=1, page_size=4, pages=3, max_waiting=2)
    assert engine.max_length == 13
    with pytest.raises(Refused, match="13") as refused:
        engine.submit(Request(tokens=(1,) * 8, max_new_tokens=6))
    assert refused.value.reason == "too_long"
    tickets = [engine.submit(Request(tokens=(1,), max_new_tokens=1)) for _ in range(2)]
    with pytest.raises(Refused) as refused:
        engine.submit(Request(tokens=(1,), max_new_tokens=1))
    assert refused.value.reason == "queue_full"
    assert engine.cancel(tickets[0]) and not engine.cancel(tickets[0]) and not engine.cancel(99)
    engine.submit(Request(tokens=(1,) * 8, max_new_tokens=5))
    events = run(engine)
    assert [len(events[t][-1].tokens) for t in tickets] == [0, 1]


@pytest.mark.optimized
def test_a_step_costs_what_its_rows_cost_and_copies_no_pages():
    model, costs = model_of(LLAMA), []
    for pages in (16, 160):
        engine = Engine(model, **{**SIZES, "pages": pages})
        compiled = engine._reader(Shape(4, 1, 10, 1))
        pool = engine._pages.k
        stays = compiled.memory_analysis()
        assert stays.alias_size_in_bytes >= 2 * pool.nbytes
        costs.append((compiled.cost_analysis()["flops"], stays.temp_size_in_bytes))
        shape = re.escape(f"[{','.join(map(str, pool.shape))}]")
        copies = re.findall(rf"= \S*{shape}\S* (?:copy|copy-start)\(.*", compiled.as_text())
        assert not copies
    assert costs[0] == costs[1]


def test_a_model_on_two_devices_answers_as_on_one():
    model = model_of(LLAMA)
    mesh = parallel.make_mesh({"tensor": 2}, jax.devices()[:2])
    specs = parallel.match_specs(model.params, LLAMA.family.sharding)
    placed = parallel.base_shardings(mesh, model.params, specs)
    model = dataclasses.replace(model, params=jax.device_put(model.params, placed))
    engine = Engine(model, **SIZES, mesh=mesh)
    engine.warm_up()
    compilations = count_compilations()
    prompts = [(i, 7, *range(i, 5 * i)) for i in range(1, 5)]
    tickets = [engine.submit(Request(tokens=p, max_new_tokens=6)) for p in prompts]
    events = run(engine)
    assert compilations() == 0
    assert engine._pages.k.sharding.shard_shape(engine._pages.k.shape)[3] == 1
    for ticket, prompt in zip(tickets, prompts, strict=True):
        expected = served_model("llama").alone(prompt, None, 6)
        assert tokens_of(events[ticket]) == expected
