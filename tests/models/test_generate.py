"""Generation with a cache is generation without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.models import llama
from lora_jax.models.generate import choose, generate, nucleus, stream
from lora_jax.models.llama import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    context_length=32,
)
PROMPTS = jnp.array([[3, 1, 4, 1, 5], [9, 2, 0, 0, 0]], jnp.int32)
LENGTHS = jnp.array([5, 2], jnp.int32)
NEVER = 49  # an id that these weights do not choose


def adapted():
    params = llama.init(CONFIG, key=jax.random.key(0))
    base, delta = lora.lora_transform(params, lora.LoRA(rank=2), key=jax.random.key(1))
    return lora.bind(base, jax.tree.map(lambda leaf: leaf + 0.05, delta))


def likeliest_after(weights, prompt, answer):
    """What `forward` would have said at each step, given the answer so far."""
    tokens = jnp.concatenate([prompt, answer])[None]
    best = jax.jit(llama.forward, static_argnums=2)(weights, tokens, CONFIG).argmax(-1)
    return best[0, prompt.size - 1 : -1]


def test_greedy_rows_of_different_lengths_are_what_forward_says():
    weights = adapted()
    tokens = generate(weights, PROMPTS, LENGTHS, CONFIG, max_new_tokens=6, eos_id=NEVER)
    for row, length, ours in zip(PROMPTS, LENGTHS.tolist(), tokens, strict=True):
        np.testing.assert_array_equal(ours, likeliest_after(weights, row[:length], ours))


def test_a_row_ends_at_eos():
    weights = adapted()
    free = generate(weights, PROMPTS, LENGTHS, CONFIG, max_new_tokens=6, eos_id=NEVER)
    eos = int(free[0, 2])
    tokens = generate(weights, PROMPTS, LENGTHS, CONFIG, max_new_tokens=6, eos_id=eos)
    first = free[0].tolist().index(eos)
    assert tokens[0].tolist() == free[0, :first].tolist() + [eos] * (6 - first)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_stream_is_generate_column_by_column(temperature):
    """To the token, also of a row that has ended, and no further than the last one."""
    weights = adapted()
    how = {"key": jax.random.key(3), "temperature": temperature, "top_p": 0.9}
    free = generate(weights, PROMPTS, LENGTHS, CONFIG, max_new_tokens=6, eos_id=NEVER, **how)
    for eos in (NEVER, int(free[0, 1])):
        how |= {"max_new_tokens": 6, "eos_id": eos}
        columns = np.stack(list(stream(weights, PROMPTS, LENGTHS, CONFIG, **how)), axis=1)
        tokens = np.asarray(generate(weights, PROMPTS, LENGTHS, CONFIG, **how))
        count = columns.shape[1]
        np.testing.assert_array_equal(columns, tokens[:, :count])
        assert (tokens[:, count:] == eos).all()
    alone = list(stream(weights, PROMPTS[:1], LENGTHS[:1], CONFIG, **how))
    assert [int(column[0]) for column in alone].count(eos) == 1
    with pytest.raises(ValueError, match="exceed the model's context of 32"):
        next(stream(weights, PROMPTS, LENGTHS, CONFIG, max_new_tokens=30, eos_id=NEVER))


def test_sampling_follows_the_distribution():
    logits = jnp.log(jnp.array([[0.6, 0.3, 0.1]]))
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.vmap(lambda key: choose(logits, key, temperature=1.0)[0])(keys)
    np.testing.assert_allclose(np.bincount(draw, minlength=3) / 4000, [0.6, 0.3, 0.1], atol=0.03)
    nucleus = jax.vmap(lambda key: choose(logits, key, temperature=1.0, top_p=0.8)[0])(keys)
    shares = np.bincount(nucleus, minlength=3) / 4000
    np.testing.assert_allclose(shares, [2 / 3, 1 / 3, 0], atol=0.03)


def kept(probabilities, top_p):
    """Which tokens `nucleus` leaves of each row."""
    logits = jnp.log(jnp.asarray(probabilities, jnp.float32))
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in nucleus(logits, top_p)]


def test_a_nucleus_is_the_smallest_set_that_reaches_its_mass():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(40, 0.3), size=30)
    for top_p in (0.0, 1e-9, 0.1, 0.37, 0.5, 0.9, 0.999):
        for row, found in zip(probabilities, kept(probabilities, top_p), strict=True):
            order = np.argsort(-row)
            count = max(1, int(np.searchsorted(np.cumsum(row[order]), top_p)) + 1)
            assert found == set(order[:count].tolist())


@pytest.mark.slow
def test_ties_at_the_border_of_a_nucleus():
    assert kept([[0.25] * 4], 0.5) == [{0, 1}]
    assert kept([[0.25] * 4], 0.51) == [{0, 1, 2}]
    assert kept([[0.125, 0.5, 0.125, 0.125, 0.125]], 0.625) == [{0, 1}]
    assert kept([[0.0, 1.0, 0.0]], 0.9) == [{1}] and kept([[0.5, 0.5]], 0.0) == [{0}]


LOGITS = jnp.array([[1.0, 3.0, 2.0], [5.0, -1.0, 5.0]])


@pytest.mark.sampled
@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 1.0, "top_p": 0.0}, {"temperature": 1e-3}, {"temperature": 1e-30},
     {"temperature": 1e-45}, {"temperature": 5e-324, "top_p": 0.5},
     {"temperature": 2.0, "top_p": 1e-12}],
    ids=str,
)  # fmt: skip
def test_what_leaves_no_choice_is_greedy(how):
    keys = jax.random.split(jax.random.key(0), 50)
    drawn = jax.vmap(lambda key: choose(LOGITS, key, **how))(keys)
    assert set(drawn[:, 0].tolist()) == {1} and set(drawn[:, 1].tolist()) <= {0, 2}
    assert how or set(drawn[:, 1].tolist()) == {0}


def test_rows_without_a_distribution_have_no_token():
    nan, inf = jnp.nan, jnp.inf
    logits = jnp.array([[-inf, -inf], [nan, 1.0], [1.0, nan], [-inf, 2.0], [inf, 0.0]])
    key = jax.random.key(0)
    assert choose(logits, None).tolist() == [-1, -1, -1, 1, 0]
    for how in ({}, {"top_p": 0.5}):
        assert choose(logits, key, temperature=1.0, **how).tolist() == [-1, -1, -1, 1, -1]
    half = choose(logits.astype(jnp.bfloat16), key, temperature=1e-30)
    assert half.tolist() == [-1, -1, -1, 1, -1]


BAD = {
    "top_p": [-0.1, 1.0001, float("nan"), float("inf")],
    "temperature": [-1.0, float("nan"), float("inf"), -1e-30],
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, values in BAD.items() for v in values])
def test_what_cannot_be_sampled_with(name, value):
    how, key = {"temperature": 1.0, name: value}, jax.random.key(0)
    with pytest.raises(ValueError, match=f"{name}=.*: expected a"):
        choose(LOGITS, key, **how)
    with pytest.raises(ValueError, match=f"{name}=.*: expected a"):
        generate({}, PROMPTS, LENGTHS, CONFIG, max_new_tokens=1, eos_id=0, key=key, **how)


@functools.partial(jax.jit, static_argnames=("eos_id", "temperature", "top_p"))
def written(weights, prompts, lengths, eos_id=NEVER, **how):
    return generate(weights, prompts, lengths, CONFIG, max_new_tokens=5, eos_id=eos_id, **how)


def test_a_row_is_what_it_is_alone_whatever_its_padding():
    weights, wide = adapted(), PROMPTS.shape[1]
    alone = [written(weights, row[None, :n], n[None]) for row, n in
             ((PROMPTS[0], LENGTHS[0]), (PROMPTS[1], LENGTHS[1]))]  # fmt: skip
    for padding in (0, 7, -1, -100, CONFIG.vocab_size, 10**6):
        padded = jnp.where(jnp.arange(wide)[None] < LENGTHS[:, None], PROMPTS, padding)
        np.testing.assert_array_equal(written(weights, padded, LENGTHS), jnp.concatenate(alone))
    # What sampling draws depends on a row's place in the batch, not on its neighbours' lengths.
    how = {"key": jax.random.key(1), "temperature": 1.0, "top_p": 0.8}
    other = written(weights, PROMPTS, jnp.array([5, 5]), **how)
    np.testing.assert_array_equal(written(weights, PROMPTS, LENGTHS, **how)[0], other[0])


def test_impossible_rows_are_refused_or_have_no_token():
    weights = adapted()
    wrong = {
        "row 1 counts 0 tokens: expected 1 to 5": (PROMPTS, jnp.array([5, 0])),
        "row 0 counts 6 tokens": (PROMPTS, jnp.array([6, 2])),
        "row 1 holds the token 50 at position 1": (PROMPTS.at[1, 1].set(50), LENGTHS),
        "row 0 holds the token -3 at position 4": (PROMPTS.at[0, 4].set(-3), LENGTHS),
        r"expected \[batch, width\] and \[batch\]": (PROMPTS[0], LENGTHS),
    }
    right = written(weights, PROMPTS, LENGTHS)
    for message, (prompts, lengths) in wrong.items():
        with pytest.raises(ValueError, match=message):
            generate(weights, prompts, lengths, CONFIG, max_new_tokens=5, eos_id=NEVER)
        if prompts.ndim == 2:
            bad = int(message.split()[1])
            tokens = written(weights, prompts, lengths)
            assert set(tokens[bad].tolist()) == {-1}
            np.testing.assert_array_equal(tokens[1 - bad], right[1 - bad])


def test_a_model_that_gives_nan_writes_no_text():
    weights = {**adapted(), "norm": jnp.full(CONFIG.hidden_size, jnp.nan)}
    assert set(written(weights, PROMPTS, LENGTHS).ravel().tolist()) == {-1}


def test_a_cache_is_not_read_past_its_end():
    params = llama.init(CONFIG, key=jax.random.key(0))
    extend = jax.jit(llama.extend, static_argnums=3)
    cache = llama.init_cache(CONFIG, 2, 6, jnp.float32)
    with pytest.raises(ValueError, match="a cache of 6 positions, 0 of them filled, has no room"):
        extend(params, jnp.zeros((2, 7), jnp.int32), cache, CONFIG)
    _, cache = extend(params, PROMPTS, cache, CONFIG)
    with pytest.raises(ValueError, match="5 of them filled, has no room for 5 more"):
        llama.extend(params, PROMPTS, cache, CONFIG)
    uneven = cache.replace(lengths=jnp.array([5, 1]))
    states, _ = extend(params, PROMPTS, uneven, CONFIG)
    assert np.isfinite(states[0, :1]).all() and np.isnan(states[0, 1:]).all()
    assert np.isfinite(states[1]).all()


def test_what_cannot_be_generated_is_said():
    weights = adapted()
    with pytest.raises(ValueError, match="exceed the model's context of 32"):
        generate(weights, PROMPTS, LENGTHS, CONFIG, max_new_tokens=28, eos_id=NEVER)
    with pytest.raises(ValueError, match="samples, which needs a key"):
        generate(weights, PROMPTS, LENGTHS, CONFIG, max_new_tokens=2, eos_id=NEVER, temperature=0.5)
    with pytest.raises(ValueError, match="max_new_tokens=0: expected at least 1"):
        generate(weights, PROMPTS, LENGTHS, CONFIG, max_new_tokens=0, eos_id=NEVER)
