"""A row of a batch is sampled as it would be alone, from the tokens that its settings leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models.generate import choose
from lora_jax.serving.sampling import RowSampling, choose_each

VOCAB = 40
LOGITS = np.random.default_rng(0).normal(size=(6, VOCAB)).astype(np.float32) * 2


def how(rows, **values):
    """Settings of each row; a single value is every row's."""
    default = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "step": 0, "logprobs": False}
    kinds = {"top_k": np.int32, "step": np.int32, "logprobs": bool}
    seed = np.broadcast_to(np.asarray(values.pop("seed", [0, 0]), np.uint32), (rows, 2))
    arrays = {
        name: np.broadcast_to(np.asarray(value, kinds.get(name, np.float32)), rows)
        for name, value in {**default, **values}.items()
    }
    return RowSampling(seed=seed, **arrays)


chosen = jax.jit(choose_each)


def drawn(logits, count=3000, **values):
    """How often each token is chosen of one row of logits, over so many steps."""
    many = np.broadcast_to(logits, (count, VOCAB))
    tokens = chosen(many, how(count, step=np.arange(count), **values)).token
    return np.bincount(tokens, minlength=VOCAB) / count


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.6}]
)
def test_frequencies_are_the_probabilities_of_what_is_left(settings):
    logits = LOGITS[0] / settings.get("temperature", 1.0)
    order = np.argsort(-logits)
    kept = order[: settings.get("top_k", VOCAB)]
    shares = np.exp(logits[kept]) / np.exp(logits[kept]).sum()
    count = np.searchsorted(np.cumsum(shares), settings.get("top_p", 1.0)) + 1
    expected = np.zeros(VOCAB)
    expected[kept[:count]] = shares[:count] / shares[:count].sum()
    found = drawn(LOGITS[0], **settings)
    assert not found[expected == 0].any()
    np.testing.assert_allclose(found, expected, atol=0.04)


def test_a_row_does_not_depend_on_the_others():
    settings = dict(
        temperature=[0.0, 1.0, 0.7, 5.0, 1.0, 1e-30],
        top_p=[1.0, 1.0, 0.5, 1.0, 0.0, 1.0],
        top_k=[0, 0, 0, 3, 0, 0],
        step=[3, 1, 4, 1, 5, 9],
    )
    seeds = np.arange(12, dtype=np.uint32).reshape(6, 2)
    together = chosen(LOGITS, how(6, seed=seeds, **settings)).token
    for row in range(6):
        own = {name: values[row] for name, values in settings.items()}
        alone = chosen(LOGITS[row : row + 1], how(1, seed=seeds[row], **own)).token
        assert alone[0] == together[row]
    np.testing.assert_array_equal(together[jnp.array([0, 4, 5])], LOGITS[[0, 4, 5]].argmax(-1))


def test_seeds_and_steps_give_other_samples():
    rows = np.broadcast_to(LOGITS[1], (6, VOCAB))
    seeds = [[0, 0], [0, 1], [1, 0], [2**32 - 1, 0], [0, 0], [0, 0]]
    tokens = {
        tuple(chosen(rows, how(6, seed=seeds, step=[s, s, s, s, s + 100, s + 200])).token.tolist())
        for s in range(4)
    }
    assert len(tokens) == 4
    columns = np.array(sorted(tokens)).T
    assert len(set(map(tuple, columns.tolist()))) == 6


def test_extreme_settings_are_their_limits():
    np.testing.assert_array_equal(drawn(LOGITS[0], 20, top_k=1), np.eye(VOCAB)[LOGITS[0].argmax()])
    everything = drawn(LOGITS[0], 4000, temperature=100.0)
    assert everything.min() > 0
    same = np.zeros(VOCAB, np.float32)
    assert set(np.flatnonzero(drawn(same, 500, top_k=3))) == {0, 1, 2}
    assert set(np.flatnonzero(drawn(same, 500, top_p=0.1))) == {0, 1, 2, 3}
    assert (drawn(same, 4000, top_k=2**31 - 1) > 0).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_not_a_number_gives_no_token(temperature):
    logits = LOGITS.copy()
    logits[1, 3] = np.nan
    logits[2] = -np.inf
    logits[3, 4] = np.inf
    logits[4, 5] = -np.inf
    tokens = chosen(logits, how(6, temperature=temperature)).token
    expected = [choose(row[None], jax.random.key(0), temperature=temperature)[0] for row in logits]
    np.testing.assert_array_equal(tokens == -1, np.array(expected) == -1)
    assert tokens[0] >= 0 and tokens[1] == -1


def test_logprobs_are_those_of_the_logits():
    wanted = np.array([True, False, True, False, False, True])
    result = chosen(LOGITS, how(6, temperature=0.8, top_k=2, logprobs=wanted))
    expected = jax.nn.log_softmax(LOGITS)
    picked = np.take_along_axis(np.asarray(expected), np.asarray(result.token)[:, None], 1)[:, 0]
    np.testing.assert_allclose(result.logprob, picked, rtol=1e-5)
    np.testing.assert_array_equal(result.top_token, np.argsort(-LOGITS)[:, :20])
    none = chosen(LOGITS, how(6))
    assert not none.top_logprob.any()
