"""Combinations of adapters, against their definitions spelled out in numpy."""

import cases
import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.arithmetic import combine, extract

PARAMS = {"layers": {"q_proj": cases.normal(0, 2, 6, 5)}, "down_proj": cases.normal(1, 5, 6)}
KEY = jax.random.key(0)


def delta_of(rank, seed, targets="all-linear"):
    method = lora.LoRA(rank=rank, alpha=3.0 * rank)
    return cases.moved(lora.lora_transform(PARAMS, method, targets=targets, key=KEY)[1], seed)


DELTAS = [delta_of(2, 1), delta_of(1, 2), delta_of(2, 3, "q_proj")]
WEIGHTS = [0.5, -2.0, 1.0]


def updates(delta):
    """`{path: update}` of every weight, zero where the delta has none."""
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    merged = lora.paths.flatten(lora.merge(zeros, delta))
    return {path: np.asarray(update, np.float64) for path, update in merged.items()}


EACH = [updates(delta) for delta in DELTAS]
TOTAL = {path: sum(w * u[path] for w, u in zip(WEIGHTS, EACH, strict=True)) for path in EACH[0]}


def best(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def assert_updates(delta, expected):
    found = updates(delta)
    for path, update in expected.items():
        np.testing.assert_allclose(found[path], update, rtol=1e-4, atol=1e-5)


def test_cat_is_the_sum():
    combined = combine(DELTAS, WEIGHTS)
    assert combined["layers"]["q_proj"].rank == 5 and combined["down_proj"].rank == 3
    assert_updates(combined, TOTAL)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_svd_is_the_best_of_its_rank(rank):
    expected = {path: best(update, rank) for path, update in TOTAL.items()}
    assert_updates(combine(DELTAS, WEIGHTS, how="svd", rank=rank), expected)


def ties(members, weights, density):
    """Of one matrix: trim, elect, merge (Yadav et al. 2023, section 3)."""
    trimmed = []
    for update in members:
        smallest = np.sort(np.abs(update).ravel())[::-1][int(density * update.size) - 1]
        trimmed.append(np.where(np.abs(update) >= smallest, update, 0))
    elected = np.where(sum(trimmed) >= 0, 1, -1)
    agree = [np.sign(update) == elected for update in trimmed]
    merged = sum(w * u * a for w, u, a in zip(weights, trimmed, agree, strict=True))
    return merged / np.maximum(sum(agree), 1)


def test_ties():
    combined = combine(DELTAS[:2], WEIGHTS[:2], how="ties", density=0.5, rank=5)
    first, second = (u["layers/q_proj"] for u in EACH[:2])
    layers = [ties(pair, WEIGHTS[:2], 0.5) for pair in zip(first, second, strict=True)]
    down = ties([u["down_proj"] for u in EACH[:2]], WEIGHTS[:2], 0.5)
    assert_updates(combined, {"layers/q_proj": np.stack(layers), "down_proj": down})


@pytest.mark.slow
def test_dare_keeps_a_random_part_and_the_mean():
    delta, rounds = DELTAS[0], 60

    def dropped(i):
        return updates(
            combine([delta], [1.0], how="dare", density=0.4, rank=5, key=jax.random.key(i))
        )

    samples = np.stack([dropped(i)["down_proj"] for i in range(rounds)])
    truth = EACH[0]["down_proj"]
    kept = np.abs(samples) > 1e-4 * np.abs(truth).max()
    assert abs(kept.mean() - 0.4) < 0.04
    np.testing.assert_allclose(
        samples[kept], np.broadcast_to(truth / 0.4, samples.shape)[kept], rtol=0.02, atol=1e-3
    )


def test_dare_ties_elects_among_what_is_kept():
    combined = combine(DELTAS[:1], [1.0], how="dare_ties", density=1.0, rank=5, key=KEY)
    assert_updates(combined, EACH[0])


def test_a_combination_trains_and_stacks_like_any_delta():
    combined = combine(DELTAS, WEIGHTS, how="svd", rank=2)
    assert combined["down_proj"].trainable().a is True
    assert lora.stack([combined, DELTAS[0]])["down_proj"].a.shape == (2, 5, 2)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_extraction_from_a_tuned_model(rank):
    tuned = jax.tree.map(lambda w: w + cases.normal(7, *w.shape), PARAMS)
    delta = extract(PARAMS, tuned, lora.LoRA(rank=rank, alpha=2.0))
    change = lora.paths.flatten(jax.tree.map(lambda t, w: np.asarray(t - w), tuned, PARAMS))
    assert_updates(delta, {path: best(update, rank) for path, update in change.items()})
    if rank == 5:
        cases.assert_close(lora.merge(PARAMS, delta), tuned, rtol=1e-4, atol=1e-5)


WRONG = {
    "weights": (dict(weights=[1.0]), "a weight for each delta: 3 and 1"),
    "how": (dict(how="linear"), "how='linear': expected cat, svd"),
    "density": (dict(how="ties"), r"how='ties' with density=None: ties and dare need one"),
    "too dense": (dict(how="ties", density=1.5), r"need one in \(0, 1\]"),
    "key": (dict(how="dare", density=0.5), "dare needs a key"),
    "rank": (dict(rank=2), "adds the ranks up: use 'svd'"),
    "nan": (dict(weights=[1.0, 2.0, float("nan")]), "expected finite numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    changes, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        combine(DELTAS, **({"weights": WEIGHTS} | changes))


def test_other_methods_and_other_trees():
    _, ia3 = lora.lora_transform(PARAMS, lora.IA3(), key=KEY)
    with pytest.raises(ValueError, match="down_proj: only LoRA can be combined, not IA3Node"):
        combine([ia3], [1.0])
    with pytest.raises(ValueError, match="down_proj: the tuned tree has no weight of shape"):
        extract(PARAMS, {"layers": PARAMS["layers"]}, lora.LoRA(rank=1))
