"""Losses of preferences in every place where a step runs, and what they refuse."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from pairs import BATCH, MAKERS, READ, batch_of, loss, pairs, start

import lora_jax as lora
from lora_jax import data, parallel, training
from lora_jax.data.pair_records import pair
from lora_jax.models import SHARDING
from lora_jax.training import checkpoints
from lora_jax.training.fit import Schedule, fit
from lora_jax.training.losses.settings import Number
from lora_jax.training.resuming import require_same_init
from lora_jax.training.stored_reference import require_reference, store_reference
from lora_jax.training.sweep import make_sweep


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


class Batches(small.Batches):
    def __next__(self):
        self.next_seed += 1
        return pairs(seed=self.next_seed)


@pytest.mark.slow
def test_a_resumed_run_ends_where_it_would_have(tmp_path):
    """Of arms with a beta each, validated with it."""
    of, base, tx = loss("dpo"), small.params(), training.adamw(steps=4)

    def evaluate(delta, base, batch, **settings):
        return of(delta, base, batch, None, **settings)

    def run(folder, steps):
        return fit(
            make_sweep(training.train_step(of, tx), evaluate, "in_turn"),
            arms(base, tx, of),
            base,
            arms=["one", "other", "third"],
            batches=Batches(),
            validation=[BATCH],
            schedule=Schedule(steps=steps, eval_every=2, checkpoint_every=2, patience=3),
            folder=folder,
            identity={},
            log=lambda record: None,
        )

    whole, _ = run(tmp_path / "whole", 4)
    run(tmp_path / "cut", 2)
    resumed, progress = run(tmp_path / "cut", 4)
    chex.assert_trees_all_equal(resumed, whole)
    expected = [of(s.delta, base, BATCH, None, **s.settings) for s in whole]
    found = jnp.array([arm.val_loss for arm in progress])
    chex.assert_trees_all_close(found, jnp.stack([t / c for t, c in expected]), rtol=1e-4)


def test_a_checkpoint_of_another_beta_is_refused(tmp_path):
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
