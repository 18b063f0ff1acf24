"""Losses of preferences against their equations over all logits, and in every place a step runs."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from pairs import both, packed, pairs, start

import lora_jax as lora
from lora_jax import data, parallel, training
from lora_jax.data.pair_records import pair
from lora_jax.models import SHARDING
from lora_jax.training import checkpoints, preference
from lora_jax.training.losses.settings import Number
from lora_jax.training.losses.target_log_probs import sequences
from lora_jax.training.stored_reference import require_reference, store_reference
from lora_jax.training.sweep import make_sweep

BATCH = pairs()
READ = training.target_log_probs(small.CONFIG, chunk=8)
GIVEN = {
    "dpo": {"beta": 0.7, "label_smoothing": 0.2},
    "dpo_norm": {"beta": 3.0, "label_smoothing": 0.1},
    "ipo": {"beta": 0.4},
    "simpo": {"beta": 2.5, "gamma": 0.6},
    "orpo": {"beta": 0.3},
    "kto": {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.7},
}
MAKERS = {name: training.LOSSES[name].make for name in GIVEN}
BESIDE_REFERENCE = ("dpo", "dpo_norm", "ipo", "kto")


def judged(batch):
    """The same rows for KTO, where the second answer of a row is one to another prompt."""
    good = np.arange(len(batch["tokens"])) % 2 == 0
    return batch | {"desirable": np.tile(good[:, None], (1, batch["tokens"].shape[-1]))}


def batch_of(name, batch=BATCH):
    return judged(batch) if name == "kto" else batch


def loss(name, **more):
    return MAKERS[name](small.CONFIG, chunk=8, **GIVEN[name], **more)


def plain(name, delta, base, batch, reference):
    """The equation of `preference` on sequences from all logits: the mean over what counts."""
    policy, theirs = (both(lora.bind(base, d), batch) for d in (delta, reference))
    if name == "kto":
        baseline = preference.kto_baseline(policy.rejected, theirs.rejected)
        good = batch["desirable"][:, 0]
        losses = preference.kto(policy.chosen, theirs.chosen, good, baseline, **GIVEN[name])
        counted = policy.chosen.lengths > 0
    else:
        beside = (policy, theirs) if name in BESIDE_REFERENCE else (policy,)
        losses = getattr(preference, name)(*beside, **GIVEN[name])
        counted = (policy.chosen.lengths > 0) & (policy.rejected.lengths > 0)
    return jnp.where(counted, losses, 0).sum() / counted.sum()


def mean(of, delta, base, batch, **settings):
    total, count = of(delta, base, batch, None, **settings)
    return total / count


@functools.cache
def found(name, references):
    """Values and gradients of one loss by one program: the equation's, ours, ours packed, and, if
    so wanted, ours with a reference of each sort."""
    base, delta = start()
    other = start(shift=-0.01)[1]
    batch = batch_of(name)
    every = {"plain": functools.partial(plain, name, reference={}), "ours": None}
    ours = functools.partial(mean, loss(name))
    every["ours"] = ours
    if references:
        stored = functools.partial(mean, loss(name, stored_reference=True))

        def kept(delta, base, batch, reference):
            log_probs = jax.lax.stop_gradient(READ(lora.bind(base, reference), batch))
            return stored(delta, base, batch | {"reference_log_probs": log_probs})

        every |= {
            "stored": functools.partial(kept, reference={}),
            "other plain": functools.partial(plain, name, reference=other),
            "other": functools.partial(ours, reference=other),
            "other stored": functools.partial(kept, reference=other),
        }

    @jax.jit
    def all_of_them(delta, base, batch, in_one_row):
        values = {key: jax.value_and_grad(fn)(delta, base, batch) for key, fn in every.items()}
        if name != "kto" and not references:
            values["packed"] = jax.value_and_grad(ours)(delta, base, in_one_row)
        return values

    row = packed(BATCH, 40) if name != "kto" else BATCH
    return all_of_them(delta, base, batch, row), delta


def agree(name, references):
    values, delta = found(name, references)
    moves = lora.trainable_mask(delta)
    for key, (value, grads) in values.items():
        expected, slopes = values["other plain" if "other" in key else "plain"]
        chex.assert_trees_all_close(value, expected, rtol=2e-5)
        masked = [
            jax.tree.map(lambda g, m: g if m else jnp.zeros_like(g), tree, moves)
            for tree in (grads, slopes)
        ]
        chex.assert_trees_all_close(*masked, rtol=2e-4, atol=2e-6)
    return values


@pytest.mark.parametrize("name", MAKERS)
def test_values_and_gradients_are_those_of_the_equations(name):
    """Also of pairs that are packed into one row."""
    agree(name, references=False)


@pytest.mark.parametrize(
    "name", [n if n == "dpo" else pytest.param(n, marks=pytest.mark.slow) for n in BESIDE_REFERENCE]
)
def test_the_reference_is_the_base_or_an_adapter_or_stored(name):
    """All with the same numbers."""
    values = agree(name, references=True)
    assert abs(values["other"][0] - values["ours"][0]) > 1e-4


def test_equations_by_hand():
    """Of one pair, with numbers that a reader can check."""
    policy, reference = (
        preference.Pairs(*(preference.Sequences(jnp.float32(x), jnp.int32(n)) for x, n in both))
        for both in ([(-4.0, 2), (-9.0, 3)], [(-5.0, 2), (-7.0, 3)])
    )
    log_sigmoid = lambda x: -np.log1p(np.exp(-x))  # noqa: E731
    margin, means = (-4 + 5) - (-9 + 7), (-4 + 5) / 2 - (-9 + 7) / 3
    expected = {
        "dpo": -0.9 * log_sigmoid(0.5 * margin) - 0.1 * log_sigmoid(-0.5 * margin),
        "dpo_norm": -log_sigmoid(0.5 * means),
        "ipo": (means - 1 / (2 * 0.5)) ** 2,
        "simpo": -log_sigmoid(0.5 * (-2 + 3) - 0.3),
        "reward": 0.5 * (-4 + 5),
        "desirable": 2 * (1 - np.exp(log_sigmoid(0.5 * (1 - 0.25)))),
        "undesirable": 3 * (1 - np.exp(log_sigmoid(0.5 * (0.25 - 1)))),
        "baseline": 0.0,
    }
    kto = functools.partial(preference.kto, policy.chosen, reference.chosen,
                            beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)  # fmt: skip
    ours = {
        "dpo": preference.dpo(policy, reference, beta=0.5, label_smoothing=0.1),
        "dpo_norm": preference.dpo_norm(policy, reference, beta=0.5),
        "ipo": preference.ipo(policy, reference, beta=0.5),
        "simpo": preference.simpo(policy, beta=0.5, gamma=0.3),
        "reward": preference.rewards(policy.chosen, reference.chosen, beta=0.5),
        "desirable": kto(True, 0.25),
        "undesirable": kto(False, 0.25),
        "baseline": preference.kto_baseline(policy.rejected, reference.rejected),
    }
    chex.assert_trees_all_close(ours, {k: np.float32(v) for k, v in expected.items()}, rtol=1e-5)


def test_sequences_are_the_segments_of_a_row():
    row = packed(BATCH, 40)
    values = np.where(row["loss_mask"], np.arange(80, dtype=np.float32).reshape(1, 2, 40), 0)
    found = sequences(values, row)
    assert found.lengths.shape == (1, 2, 40)
    for slot in range(2):
        for i in range(3):
            mine = row["segment_ids"][0, slot] == i + 1
            assert found.log_probs[0, slot, i] == values[0, slot][mine].sum()
            assert found.lengths[0, slot, i] == row["loss_mask"][0, slot][mine].sum()
    assert not found.lengths[..., 3:].any()


def test_micro_batches_nf4_and_a_mesh_give_the_numbers_of_one_batch():
    """KTO's baseline is that of the rows that are computed together, and so not cut here."""
    of, tx = loss("dpo"), optax.sgd(0.5)
    base, delta = start(base=lora.quantize(small.params(), "nf4", block_size=16))
    batch = pairs(rows=8)
    state = training.init_state(delta, tx, seed=0)
    whole = jax.jit(training.train_step(of, tx))(state, base, batch)
    cut = jax.jit(training.train_step(of, tx, accumulate=2))(state, base, batch)
    chex.assert_trees_all_close(cut, whole, rtol=1e-4, atol=1e-6)
    assert int(whole[1].count) == 7
    mesh = parallel.make_mesh({"fsdp": 4, "sequence": 2})
    specs = parallel.match_specs(base, SHARDING)
    run = parallel.on_mesh(mesh, specs, of.fields)
    with run.context():
        step = run.step(training.train_step(of, tx), False)
        placed = run.states(state, False), run.base(base), run.batch(batch)
        over = step(*placed)
    chex.assert_trees_all_close(jax.device_get(over), jax.device_get(whole), rtol=1e-4, atol=1e-6)


ARMS = [(1, 0.1), (4, 0.1), (4, 0.8)]  # rank and beta


def arms(base, tx, of):
    states = []
    for rank, beta in ARMS:
        _, delta = lora.lora_transform(base, lora.LoRA(rank=rank), key=jax.random.key(rank))
        settings = of.settings_of(beta=beta)
        states.append(training.init_state(delta, tx, learning_rate=3e-2, seed=0, settings=settings))
    return states


@pytest.mark.parametrize("mode", ["batched", pytest.param("in_turn", marks=pytest.mark.slow)])
def test_a_sweep_over_rank_and_beta_is_so_many_runs(mode):
    of, base, tx = loss("dpo"), small.params(), training.adamw(steps=9)
    step = training.train_step(of, tx)
    alone = jax.jit(step)

    def evaluate(delta, base, batch, **settings):
        return of(delta, base, batch, None, **settings)

    sweep = make_sweep(step, evaluate, mode)
    packed_states = sweep.pack(arms(base, tx, of))
    solo = arms(base, tx, of)
    for seed in range(2):
        packed_states, metrics = sweep.step(packed_states, base, pairs(seed=seed), [True] * 3)
        moved = [alone(state, base, pairs(seed=seed)) for state in solo]
        solo = [state for state, _ in moved]
        chex.assert_trees_all_close(metrics.loss, jnp.stack([m.loss for _, m in moved]), rtol=1e-4)
    for ours, theirs in zip(sweep.unpack(packed_states), solo, strict=True):
        chex.assert_trees_all_close(ours.delta, theirs.delta, rtol=1e-3, atol=1e-5)
        assert ours.settings == theirs.settings
    totals, _ = sweep.evaluate(packed_states, base, BATCH)
    expected = [of(s.delta, base, BATCH, None, **s.settings)[0] for s in solo]
    chex.assert_trees_all_close(totals, jnp.stack(expected), rtol=1e-3)
    assert abs(expected[1] - expected[2]) > 1e-3


def test_arms_have_settings_of_the_same_names():
    of, tx = loss("dpo"), training.adamw(steps=9)
    states = arms(small.params(), tx, of)
    states[1] = dataclasses.replace(states[1], settings={})
    for mode in ("batched", "in_turn"):
        sweep = make_sweep(training.train_step(of, tx), of, mode)
        with pytest.raises(ValueError, match="arm 1 has settings .* nothing, arm 0 for beta"):
            sweep.pack(states)


def test_a_checkpoint_of_another_beta_is_refused(tmp_path):
    from lora_jax.training.resuming import require_same_init

    of, tx = loss("dpo"), training.adamw(steps=9)
    states = arms(small.params(), tx, of)
    checkpoints.save(tmp_path, 3, states, identity={}, position={})
    _, restored, _ = checkpoints.restore(tmp_path, states, identity={})
    require_same_init(tmp_path, "abc", states, restored)
    chex.assert_trees_all_equal(restored, states)
    states[1] = dataclasses.replace(states[1], settings=of.settings_of(beta=0.2))
    with pytest.raises(ValueError, match=r"arm 'b' was begun with other .* settings/beta"):
        require_same_init(tmp_path, "abc", states, restored)


@pytest.mark.parametrize(
    "name", [n if n == "kto" else pytest.param(n, marks=pytest.mark.slow) for n in MAKERS]
)
def test_steps_prefer_the_chosen(name):
    of, tx = loss(name), training.adamw(steps=20)
    base = small.params()
    [state] = small.states(base, [(lora.LoRA(rank=4), "all-linear", 3e-2, 0)], tx)
    step = jax.jit(chex.assert_max_traces(lambda *a: training.train_step(of, tx)(*a), n=1))
    losses = []
    for _ in range(12):
        state, metrics = step(state, base, batch_of(name))
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("name", MAKERS)
def test_a_setting_out_of_range_is_refused(name):
    for argument, setting in loss(name).settings.items():
        if not isinstance(setting, Number):
            continue
        with pytest.raises(ValueError, match=rf"{name}_loss\({argument}=-1\): expected a number"):
            MAKERS[name](small.CONFIG, **{argument: -1})
        for wrong in (-1.0, np.nan, np.inf, np.zeros(2), "a"):
            with pytest.raises(ValueError, match=rf"the loss {name}: {argument}=.*expected a num"):
                loss(name).settings_of(**{argument: wrong})
    with pytest.raises(ValueError, match=rf"the loss {name} has no setting 'bet'; it has beta"):
        loss(name)(*start()[::-1], batch_of(name), None, bet=1.0)


def test_a_reference_of_another_base_is_refused():
    """By its shapes, an adapter; by its numbers, what is stored."""
    base, delta = start()
    wide = dataclasses.replace(small.CONFIG, hidden_size=32, vocab_size=64)
    _, foreign = start(base=small.llama.init(wide, key=jax.random.key(0)))
    of = loss("dpo")
    with pytest.raises(ValueError, match=r"layers/attn/\w+.*16|32"):
        jax.eval_shape(lambda: of(delta, base, BATCH, None, reference=foreign))
    with pytest.raises(ValueError, match="reference=list: expected a delta"):
        of(delta, base, BATCH, None, reference=[1])
    with pytest.raises(ValueError, match="expected a delta node, found"):
        of(delta, base, BATCH, None, reference=base)
    stored = READ(lora.bind(base, {}), BATCH)
    batch = BATCH | {"reference_log_probs": stored}
    require_reference(READ, base, batch)
    with pytest.raises(ValueError, match="of row 0 differ .* another base or adapter|row [12]"):
        require_reference(READ, base, batch, reference=delta)
    worse = batch | {"reference_log_probs": stored.at[1, 0, 5].set(jnp.nan)}
    with pytest.raises(ValueError, match="of row 1 differ .* by nan"):
        require_reference(READ, base, worse)
    with pytest.raises(ValueError, match="the batch lacks reference_log_probs: it holds tokens"):
        require_reference(READ, base, BATCH)
    with pytest.raises(ValueError, match="the loss dpo needs the field 'reference_log_probs'"):
        loss("dpo", stored_reference=True)(delta, base, BATCH, None)


def test_a_reference_is_stored_with_the_examples_and_packed_with_them():
    """The same loss as with the reference computed in the step, from text to the step."""
    config = dataclasses.replace(small.CONFIG, vocab_size=259, context_length=128)
    base, delta = start(base=small.llama.init(config, key=jax.random.key(0)))
    tokenizer = data.byte_tokenizer()
    record = {"prompt": "p", "chosen": "yes", "rejected": "n"}
    rows = [pair(record), pair(record | {"chosen": "maybe so"}), pair(record | {"prompt": "q"})]
    encoded = data.encode_pairs(rows, tokenizer, seq_len=100)
    read = training.target_log_probs(config)
    stored = store_reference(read, base, encoded, batch_size=2, seq_len=100)
    assert stored.examples[0].keys() - encoded.examples[0].keys() == {
        "0/reference_log_probs", "1/reference_log_probs"
    }  # fmt: skip
    [plain_batch], [batch] = (
        data.eval_batches(source, tokenizer, batch_size=2, seq_len=100)
        for source in (encoded, stored)
    )
    assert batch["segment_ids"].max() == 3 and batch["reference_log_probs"].shape == (2, 2, 100)
    require_reference(read, base, batch)
    computed = training.dpo_loss(config)(delta, base, plain_batch, None)
    kept = training.dpo_loss(config, stored_reference=True)(delta, base, batch, None)
    chex.assert_trees_all_close(kept, computed, rtol=1e-5)
    assert int(kept[1]) == 3
