"""Rows of a batch with adapters of a bank equal each adapter alone."""

import contextlib
import functools
import re

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from cases import assert_close

import lora_jax as lora
from lora_jax import parallel, serving
from lora_jax.models import llama
from lora_jax.serving import Place
from lora_jax.serving.normal_form import form_of


def place_all(base, bank, deltas):
    """The bank with every adapter at a place of its own, pages in no order."""
    free = list(np.random.default_rng(0).permutation(bank.pages))
    places = {}
    for slot, (name, delta) in enumerate(deltas.items()):
        packed = serving.pack(bank, serving.normal_form(base, delta))
        places[name] = Place(tuple(int(free.pop()) for _ in packed.pages), slot)
        bank = serving.put(bank, places[name], packed)
    return bank, places


@pytest.mark.parametrize(
    "tied, nf4",
    [
        (True, True),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
    ],
)
def test_each_row_equals_its_adapter_alone(tied, nf4):
    config, base, tokens = zoo.model(tied=tied, nf4=nf4)
    deltas = zoo.deltas(base, tied=tied)
    bank, places = place_all(base, zoo.bank_for(base, tied=tied, dtype=jnp.float32), deltas)
    names = [*deltas, None]
    order = np.random.default_rng(1).permutation(len(names))
    names = [names[i] for i in order]
    batch = jnp.tile(tokens[:1], (len(names), 1))

    @jax.jit
    def served(bank, rows, tokens):
        weights = serving.bind(base, bank, rows)
        cache = llama.start_cache(weights, config, len(tokens), tokens.shape[1])
        head = llama.output_head(weights)
        steps = []
        for t in range(2):  # decoding, a token of each row at a time
            x, cache = llama.extend(weights, tokens[:, t : t + 1], cache, config)
            steps.append(config.family.read_out(x, head, config)[:, 0])
        return llama.forward(weights, tokens, config), jnp.stack(steps, 1)

    rows = zoo.rows(*(places.get(name) for name in names))
    whole, steps = served(bank, rows, batch)
    alone = jax.jit(lambda w, t: llama.forward(w, t, config))
    for row, name in enumerate(names):
        weights = base if name is None else lora.bind(base, deltas[name])
        expected = alone(weights, tokens[:1])[0]
        atol = 1e-6 if name is None else 1e-4  # of the largest logit
        assert_close(whole[row], expected, rtol=0, atol=atol)
        assert_close(steps[row], expected[:2], rtol=0, atol=1e-4)
        assert name is None or np.abs(whole[row] - alone(base, tokens[:1])[0]).max() > 1e-3
    assert_close(whole, served(bank, rows, batch)[0])


def test_rows_of_the_base_alone_are_the_bases_bit_for_bit():
    config, base, tokens = zoo.model()
    bank = zoo.bank_for(base)
    weights = serving.bind(base, bank, zoo.rows(None, None, width=1))
    forward = jax.jit(lambda w: llama.forward(w, tokens, config))
    chex.assert_trees_all_equal(forward(weights), forward(base))


def test_puts_drops_and_programs_are_compiled_once():
    config, base, tokens = zoo.model()
    bank = zoo.bank_for(base)
    chosen = zoo.deltas(base)
    packed = {n: serving.pack(bank, serving.normal_form(base, d)) for n, d in chosen.items()}

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(bank, rows):
        return llama.forward(serving.bind(base, bank, rows), tokens, config)

    first = Place(tuple(range(len(packed["lora, rank 64"].pages))), 0)
    bank = serving.put(bank, first, packed["lora, rank 64"])
    bank = serving.drop(bank, first)
    run(bank, zoo.rows(first, None))
    with nothing_compiled():
        for slot, adapter in enumerate(packed.values()):
            place = Place(tuple(range(3, 3 + len(adapter.pages))), slot)
            bank = serving.put(bank, place, adapter)
            run(bank, zoo.rows(None, place))
            bank = serving.drop(bank, place)
    fresh = zoo.bank_for(base)
    chex.assert_trees_all_equal(bank, fresh)


@contextlib.contextmanager
def nothing_compiled():
    compiled = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_programs_cost_does_not_grow_with_the_bank(dtype):
    config, base, tokens = zoo.model()

    def compiled(pages, width):
        bank = zoo.bank_for(base, pages=pages, slots=pages, dtype=dtype)
        rows = zoo.rows(None, None, width=width)

        def run(bank, base, rows, tokens):
            return llama.forward(serving.bind(base, bank, rows), tokens, config)

        return jax.jit(run).lower(bank, base, rows, tokens).compile()

    few, many = compiled(16, 1), compiled(512, 1)
    held = [program.memory_analysis().temp_size_in_bytes for program in (few, many)]
    assert held[0] == held[1]  # no copy of it, in another dtype for one
    if dtype == jnp.float32:  # of others a fusion counts what it could convert
        wide = compiled(16, 4)
        flops = [program.cost_analysis()["flops"] for program in (few, many, wide)]
        assert flops[0] == flops[1] < flops[2]


@pytest.mark.mixed_dtypes
def test_a_bank_of_bfloat16_over_a_base_of_bfloat16():
    config, params, tokens = zoo.model(tied=True)
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    targets = ("all-linear", "embed")
    delta = cases.llama_delta(base, lora.LoRA(rank=3), size=0.03, targets=targets)
    bank = serving.make_bank(base, pages=4, slots=2, targets=targets)
    bank = serving.put(bank, Place((2,), 1), serving.pack(bank, serving.normal_form(base, delta)))
    weights = serving.bind(base, bank, zoo.rows(Place((2,), 1), None, width=2))

    def loss(weights):
        return llama.forward(weights, tokens, config).astype(jnp.float32)

    served = jax.jit(loss)(weights)
    alone = jax.jit(loss)(lora.bind(base, delta))
    assert_close(served[1], jax.jit(loss)(base)[1], rtol=0, atol=1e-6)
    assert_close(served[0], alone[0], rtol=0, atol=0.02)  # 0.01 from float32, both
    rows = weights["embed"].rows.value
    gradient = jax.jit(jax.grad(lambda bank: loss(serving.bind(base, bank, rows)).mean()))(bank)
    pages = gradient.targets["embed"].a
    assert pages.dtype == jnp.bfloat16 and pages[2].any() and not pages[:2].any()


def refuses(message, f, *arguments, **kwargs):
    with pytest.raises(ValueError, match=re.escape(message)):
        f(*arguments, **kwargs)


def packed_of(base, bank, method, **kwargs):
    return serving.pack(bank, serving.normal_form(base, cases.llama_delta(base, method, **kwargs)))


def test_what_the_bank_has_no_room_for_is_refused():
    _, base, _ = zoo.model()
    bank = serving.make_bank(base, pages=4, slots=2, targets="attention", widest=16, post="q_proj")
    of = functools.partial(packed_of, base, bank)
    refuses("layers/mlp/down_proj: the adapter changes it", of, lora.LoRA(rank=1), targets="mlp")
    refuses("bank's widest adapter is of rank 16. Make", of, lora.LoRA(rank=17), targets="qv")
    refuses("k_proj: the adapter scales outputs", of, lora.IA3(), targets="k_proj")
    scales_inputs = lora.IA3(scales="input")
    refuses("q_proj: the adapter scales inputs", of, scales_inputs, targets="q_proj")
    adapter = of(lora.LoRA(rank=12), targets="qv")
    short = Place((1,), 0)
    refuses("an adapter of 2 pages has no place in 1 pages", serving.put, bank, short, adapter)
    for pages, slot in [((1, 4), 0), ((1, 1), 0), ((0, 1), 2), ((-1, 1), 0)]:
        message = "is no place in a bank of 4 pages and 2 slots"
        refuses(message, serving.put, bank, Place(pages, slot), adapter)
    refuses("make_bank(pages=0): expected at least 1", serving.make_bank, base, pages=0, slots=1)
    refuses(
        "make_bank(post=...) names layers/mlp/down_proj, which is no target",
        functools.partial(serving.make_bank, base, pages=1, slots=1),
        targets="qv",
        post="down_proj",
    )


UNSERVED = [
    (lora.Bottleneck(size=2), "q_proj", "BottleneckNode has no served form"),
    (lora.Full(), "q_proj", "a Full delta is as large as its weight: merge it"),
    (lora.Prompt(length=2), "embed", "PromptNode has no served form"),
    (lora.Prefix(length=2), "k_proj", "PrefixNode has no served form"),
]


@pytest.mark.parametrize("method, targets, message", UNSERVED, ids=lambda value: str(value)[:10])
def test_methods_without_a_served_form_are_refused(method, targets, message):
    _, base, _ = zoo.model()
    delta = cases.llama_delta(base, method, targets=targets)
    refuses(message, serving.normal_form, base, delta)


def test_biases_that_ia3_scales_are_refused():
    node = lora.methods.IA3BiasNode(of="k_proj")
    refuses("IA3 over a layer with a bias", form_of, node, None)


def test_an_adapter_of_another_base_is_refused():
    _, base, _ = zoo.model()
    _, other, _ = cases.llama_case()
    delta = cases.llama_delta(other, lora.LoRA(rank=2), targets="qv")
    refuses("layers/attn/q_proj: the adapter: the delta was made", serving.normal_form, base, delta)
    strange = cases.llama_delta({"tower": other}, lora.LoRA(rank=2), targets="qv")
    refuses("tower/layers/attn/q_proj: the adapter was made", serving.normal_form, base, strange)
    bank = zoo.bank_for(base)
    forms = serving.normal_form(other, delta)
    refuses("layers/attn/q_proj: the adapter was made for another", serving.pack, bank, forms)
    refuses("the bank was made for a matrix of (", serving.bind, other, bank, zoo.rows(None))
    refuses("the bank has a target 'lm_head'", serving.bind, zoo.model(tied=True)[1], bank,
            zoo.rows(None))  # fmt: skip


def test_rows_that_do_not_fit_the_batch_are_refused():
    config, base, tokens = zoo.model()
    weights = serving.bind(base, zoo.bank_for(base), zoo.rows(None, None, None))
    refuses("its first axis must be the batch", llama.forward, weights, tokens, config)
    refuses("no single dense form", lambda: weights["lm_head"].dense())
    refuses("of 3 pages does not fit rows of 2", zoo.rows, Place((0, 1, 2), 0), width=2)
    assert serving.rows_of([None, Place((5, 1, 2), 3)]).pages.tolist() == [[-1] * 4, [5, 1, 2, -1]]


def test_a_table_with_scales_cannot_be_tied():
    config, base, tokens = zoo.model(tied=True)
    bank = serving.make_bank(base, pages=1, slots=1, targets="embed", post="embed")
    weights = serving.bind(base, bank, zoo.rows(None, None))
    refuses("a tied output head reads its embedding", llama.forward, weights, tokens, config)


def test_gradients_flow_to_the_pages_of_each_row():
    config, base, tokens = zoo.model()
    bank = serving.make_bank(base, pages=4, slots=2, targets="qv")
    adapter = packed_of(base, bank, lora.LoRA(rank=8), targets="qv")
    bank = serving.put(bank, Place((2,), 0), adapter)
    rows = zoo.rows(Place((2,), 0), None, width=1)

    @jax.jit
    @jax.grad
    def gradient(bank):
        return (llama.forward(serving.bind(base, bank, rows), tokens, config) ** 2).mean()

    for target in gradient(bank).targets.values():
        used = np.asarray(target.b)[:, 2]
        rest = np.delete(np.asarray(target.b), 2, axis=1)
        assert np.abs(used).max() > 0 and not rest.any()


def test_a_bank_follows_its_base_over_a_mesh():
    config, base, tokens = zoo.model()
    deltas = {name: delta for name, delta in zoo.deltas(base).items() if "embedding" not in name}
    bank, places = place_all(base, zoo.bank_for(base, dtype=jnp.float32), deltas)
    rows = zoo.rows(places["dora"], places["rslora all-linear, rank 13"])

    def run(bank, base, rows):
        return llama.forward(serving.bind(base, bank, rows), tokens, config)

    expected = jax.jit(run)(bank, base, rows)
    mesh = parallel.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    specs = parallel.match_specs(base, config.family.sharding)
    lying = serving.shardings(mesh, bank, specs)
    assert lying.targets["layers/mlp/down_proj"].a.spec == jax.P(None, None, None, "tensor")
    assert lying.targets["layers/mlp/down_proj"].pre.spec == jax.P(None, None, "tensor")
    placed = jax.device_put(base, parallel.base_shardings(mesh, base, specs))
    with jax.set_mesh(mesh):
        y = jax.jit(run)(jax.device_put(bank, lying), placed, rows)
    assert_close(y, expected, rtol=0, atol=1e-4)
