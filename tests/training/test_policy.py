"""Answers by the current policy, their worth beside their group, and the losses of both."""

import dataclasses
import functools
import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

import lora_jax as lora
from lora_jax import data, training
from lora_jax.models import llama
from lora_jax.models.generate import generate, sample
from lora_jax.training import policy
from lora_jax.training.reinforce import policy_step
from lora_jax.training.rewards import scored
from lora_jax.training.rollouts import Sampling, fitting_prompts, make_rollout, prompt_text
from lora_jax.training.rounding import tolerance_of

TOKENIZER = data.byte_tokenizer()
CONFIG = dataclasses.replace(small.CONFIG, vocab_size=259, context_length=128)
SAMPLING = Sampling(group=3, prompt_tokens=50, new_tokens=6, temperature=0.8)
EXAMPLES = [{"prompt": "a?", "id": "first"}, {"prompt": "longer?", "id": "second"}]
READ = training.target_log_probs(CONFIG, temperature=0.8)


def start(shift=0.1):
    base = llama.init(CONFIG, key=jax.random.key(0))
    _, delta = lora.lora_transform(base, lora.LoRA(rank=2), key=jax.random.key(1))
    return base, jax.tree.map(lambda x: x + shift, delta)


def vowels(prompt, completion, example):
    return sum(letter in "aeiou" for letter in completion) + (example["id"] == "second")


def test_advantages_are_those_of_a_group():
    rewards = np.array([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0], [np.nan, 0.0, 4.0], [np.nan] * 3])
    found = policy.group_advantages(rewards, scale=True)
    first = (rewards[0] - 3) / (np.std(rewards[0], ddof=1) + 1e-4)
    third = np.array([0, -2, 2]) / (np.sqrt(8) + 1e-4)
    expected = np.stack([first, np.zeros(3), third, np.zeros(3)]).astype(np.float32)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)
    centred = policy.group_advantages(rewards, scale=False)
    chex.assert_trees_all_close(centred[0], np.float32([-2, -1, 3]))


def test_clipping_and_the_divergence_by_hand():
    policy_, sampler = jnp.log(jnp.array([0.6, 0.6, 0.1, 0.1])), jnp.log(jnp.full(4, 0.3))
    worth = jnp.array([1.0, -1.0, 1.0, -1.0])
    low_high = {"low": 0.2, "high": 0.3}
    found = policy.clipped(policy_, sampler, worth, **low_high)
    chex.assert_trees_all_close(found, jnp.array([-1.3, 2.0, -1 / 3, 0.8]), rtol=1e-5)
    slopes = jax.grad(lambda x: policy.clipped(x, sampler, worth, **low_high).sum())(policy_)
    assert (slopes == 0).tolist() == [True, False, False, True]
    k3 = policy.k3(jnp.log(0.5), jnp.log(0.25))
    chex.assert_trees_all_close(k3, jnp.float32(0.5 + np.log(2) - 1), rtol=1e-5)


def rollouts(rows=6, length=9):
    rng = np.random.default_rng(1)
    batch = small.batch(0, rows, length)
    lengths = rng.integers(3, length + 1, (rows, 1))
    batch["segment_ids"] = (np.arange(length) < lengths).astype(np.int32)
    batch["loss_mask"] = (np.arange(length) >= 2) & (batch["segment_ids"] > 0)
    batch["loss_mask"][-1] = False
    worth = np.tile(rng.normal(size=(rows, 1)), (1, length)).astype(np.float32)
    noise = rng.normal(size=(rows, length)).astype(np.float32) * 0.2 - 4
    return batch | {"sampler_log_probs": noise, "advantages": worth}


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_losses_are_those_of_the_equations(kl):
    """In value and gradient, cut into micro-batches too; the last row has no answer."""
    base = small.params()
    _, delta = lora.lora_transform(base, lora.LoRA(rank=2), key=jax.random.key(0))
    delta, batch = jax.tree.map(lambda x: x + 0.05, delta), rollouts()

    def plain(delta, base, batch, dr):
        def read(d):
            logits = llama.forward(lora.bind(base, d), batch["tokens"], small.CONFIG)
            log_probs = jax.nn.log_softmax(logits / 0.7)
            picked = jnp.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
            return jnp.where(batch["loss_mask"], picked, 0)

        ours, reference = read(delta), read({})
        ratio = jnp.exp(ours - batch["sampler_log_probs"])
        losses = -jnp.minimum(
            ratio * batch["advantages"], jnp.clip(ratio, 0.8, 1.3) * batch["advantages"]
        )
        losses += kl * (jnp.exp(reference - ours) - (reference - ours) - 1)
        mask = batch["loss_mask"]
        over = 20 if dr else jnp.maximum(mask.sum(-1), 1)
        return (jnp.where(mask, losses, 0).sum(-1) / over).sum() / 5

    how = {"clip_high": 0.3, "kl": kl, "temperature": 0.7, "chunk": 8}
    makers = {
        "grpo": (training.grpo_loss(small.CONFIG, **how), False),
        "dr_grpo": (training.dr_grpo_loss(small.CONFIG, tokens=20, **how), True),
    }

    @jax.jit
    def both(delta, base, batch):
        found = {}
        for name, (loss, dr) in makers.items():
            tx = optax.sgd(1.0)
            state = training.init_state(delta, tx, seed=0)
            whole, cut = (
                training.train_step(loss, tx, accumulate=n).gradients(state, base, batch)
                for n in (1, 2)
            )
            expected = jax.value_and_grad(functools.partial(plain, dr=dr))(delta, base, batch)
            moves = lora.trainable_mask(delta)
            slopes = jax.tree.map(lambda g, m: g if m else jnp.zeros_like(g), expected[1], moves)
            found[name] = whole, cut, (slopes, expected[0], jnp.float32(5))
        return found

    for name, (whole, cut, expected) in both(delta, base, batch).items():
        chex.assert_trees_all_close(whole, expected, rtol=3e-4, atol=1e-5)
        chex.assert_trees_all_close(cut, expected, rtol=3e-4, atol=1e-5)
        assert set(makers[name][0].settings) == (
            {"clip", "clip_high", "kl", "reference"} if kl else {"clip", "clip_high"}
        )


def test_sampled_tokens_carry_the_probability_that_they_were_drawn_with():
    """Those of `forward`; the tokens are `generate`'s with the same key."""
    base, delta = start()
    weights, config = lora.bind(base, delta), CONFIG
    prompts, lengths = jnp.array([[3, 1, 4, 1], [9, 2, 0, 0]]), jnp.array([4, 2])
    how = {"max_new_tokens": 5, "eos_id": 258, "key": jax.random.key(4), "temperature": 0.7}
    tokens, log_probs = jax.jit(lambda w: sample(w, prompts, lengths, config, **how))(weights)
    np.testing.assert_array_equal(generate(weights, prompts, lengths, config, **how), tokens)
    for row, length in enumerate(lengths.tolist()):
        whole = jnp.concatenate([prompts[row, :length], tokens[row]])
        logits = llama.forward(weights, whole[None], config)[0, length - 1 : -1]
        expected = jax.nn.log_softmax(logits / 0.7)[jnp.arange(5), tokens[row]]
        chex.assert_trees_all_close(log_probs[row], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="temperature=0 takes the likeliest token"):
        sample(weights, prompts, lengths, config, **how | {"temperature": 0})


def test_a_rollout_is_a_batch_of_answers_by_the_given_delta():
    base, delta = start()
    roll_out = make_rollout(CONFIG, TOKENIZER, vowels, SAMPLING)
    found = roll_out(delta, base, EXAMPLES, jax.random.key(0))
    assert found.rewards.shape == found.lengths.shape == (2, 3) and len(found.completions) == 6
    assert found.prompts[0] == found.prompts[2] == prompt_text(EXAMPLES[0], TOKENIZER)
    assert len(set(found.completions[:3])) > 1  # a group's answers differ
    batch = found.batch
    for row in range(6):
        counts = batch["loss_mask"][row]
        text = TOKENIZER.decode(batch["targets"][row][counts].tolist(), skip_special_tokens=True)
        assert text == found.completions[row] and counts.sum() == found.lengths.flat[row]
        before = batch["tokens"][row, : counts.argmax() + 1].tolist()
        assert TOKENIZER.decode(before) == found.prompts[row]
        assert batch["segment_ids"][row].sum() == len(before) + counts.sum() - 1
    worth = policy.group_advantages(found.rewards, scale=True).reshape(-1)
    first = batch["loss_mask"].argmax(1)
    chex.assert_trees_all_close(batch["advantages"][np.arange(6), first], worth)
    seen = np.where(batch["loss_mask"], batch["sampler_log_probs"], 0)
    trainer = READ(lora.bind(base, delta), batch)
    chex.assert_trees_all_close(trainer, jnp.asarray(seen), rtol=1e-4, atol=1e-4)
    loss = training.grpo_loss(CONFIG, temperature=0.8)
    assert jax.eval_shape(lambda: loss(delta, base, batch, None))[1].shape == ()


def learning(reward, roll_out=None, **options):
    tx = training.adamw(steps=20, schedule="constant")
    base, delta = start(0.0)
    state = training.init_state(delta, tx, learning_rate=3e-2, seed=0)
    step = training.train_step(training.grpo_loss(CONFIG, temperature=0.8), tx)
    roll_out = roll_out or make_rollout(CONFIG, TOKENIZER, reward, SAMPLING)
    return state, base, policy_step(step, roll_out, READ, **options), roll_out


def test_answers_that_lag_behind_by_one_step_are_refused():
    """And those of the current delta are not: with a step that moves the policy visibly."""
    state, base, step, roll_out = learning(vowels)
    old = jax.tree.map(jnp.copy, state.delta)
    state, metrics, found = step(state, base, EXAMPLES)
    assert np.isfinite(metrics.loss) and metrics.count == 6
    again = roll_out(
        old, base, EXAMPLES, jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 0x706F6C)
    )
    chex.assert_trees_all_equal(again.batch, found.batch)  # the key follows from seed and step
    state, metrics, found = step(state, base, EXAMPLES)  # as drawn by what the first step made

    lagging = lambda delta, *rest: roll_out(old, *rest)  # noqa: E731
    late, base, step, _ = learning(vowels, lagging)
    late, _, _ = step(late, base, EXAMPLES)
    with pytest.raises(ValueError, match="sampler and trainer differ by .* another policy"):
        step(late, base, EXAMPLES)


def test_narrow_floats_may_differ_by_more():
    base, _ = start()
    assert tolerance_of(base) == tolerance_of(lora.quantize(base, "nf4", block_size=16)) == 0.01
    assert tolerance_of(base | {"embed": base["embed"].astype(jnp.bfloat16)}) == 0.2


@pytest.mark.slow
def test_a_reward_is_learnt():
    """Answers of bytes below 128, which are half of all."""
    reward = lambda prompt, completion, example: sum(c.isascii() for c in completion)  # noqa: E731
    state, base, step, _ = learning(reward)
    rewards = []
    for _ in range(25):
        state, _, found = step(state, base, EXAMPLES * 4)
        rewards.append(found.rewards.mean())
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.5


def fails(prompt, completion, example):
    if example["id"] == "second":
        raise ZeroDivisionError("of nothing")
    return np.float32(len(completion))


@pytest.mark.parametrize(
    "reward, found",
    [
        (fails, "raised ZeroDivisionError: of nothing"),
        (lambda p, c, e: np.nan if e["id"] == "second" else 1, "returned nan, expected a finite"),
        (lambda p, c, e: np.inf if e["id"] == "second" else 1.0, "returned inf"),
        (lambda p, c, e: None if e["id"] == "second" else 1.0, "returned None, expected a number"),
    ],
)
def test_a_reward_that_fails_names_the_example(reward, found, caplog):
    given = (["p", "q"], ["one", "two"], EXAMPLES)
    named = f"the reward of example second, prompt 'q', completion 'two', {found}"
    with pytest.raises(ValueError, match=named):
        scored(reward, *given)
    with caplog.at_level(logging.WARNING):
        rewards = scored(reward, *given, on_error="skip")
    assert np.isfinite(rewards[0]) and np.isnan(rewards[1])
    assert named in caplog.text and "left out" in caplog.text
    with pytest.raises(ValueError, match="No reward of 1 succeeded: the reward of example second"):
        scored(reward, *([x[1]] for x in given), on_error="skip")
    with pytest.raises(ValueError, match="on_error='go': expected stop or skip"):
        scored(reward, *given, on_error="go")


def test_a_run_goes_on_without_the_answers_whose_reward_fails():
    base, delta = start()
    skips = dataclasses.replace(SAMPLING, on_error="skip")
    found = make_rollout(CONFIG, TOKENIZER, fails, skips)(delta, base, EXAMPLES, jax.random.key(0))
    assert np.isnan(found.rewards[1]).all() and not np.isnan(found.rewards[0]).any()
    counted = found.batch["loss_mask"].any(1)
    assert counted.tolist() == [True] * 3 + [False] * 3
    with pytest.raises(ValueError, match="the reward of example second, .*raised ZeroDivision"):
        make_rollout(CONFIG, TOKENIZER, fails, SAMPLING)(delta, base, EXAMPLES, jax.random.key(0))


def test_prompts_that_do_not_fit(caplog):
    base, delta = start()
    long = {"prompt": "x" * 60}
    roll_out = make_rollout(CONFIG, TOKENIZER, vowels, SAMPLING)
    with pytest.raises(ValueError, match="the prompt of example 1, which begins .* takes 79 "):
        roll_out(delta, base, [EXAMPLES[0], long], jax.random.key(0))
    with caplog.at_level(logging.WARNING):
        kept, skipped = fitting_prompts([EXAMPLES[0], long], TOKENIZER, SAMPLING)
    assert (kept, skipped) == ([EXAMPLES[0]], 1) and "Skipped 1 prompts of more" in caplog.text
    with pytest.raises(ValueError, match="No prompt fits 50 tokens: the shortest takes"):
        fitting_prompts([long], TOKENIZER, SAMPLING)
    with pytest.raises(ValueError, match="exceed the model's context of 128"):
        make_rollout(CONFIG, TOKENIZER, vowels, dataclasses.replace(SAMPLING, new_tokens=90))
    with pytest.raises(ValueError, match="group=1: expected at least 2"):
        dataclasses.replace(SAMPLING, group=1)
    with pytest.raises(ValueError, match="the example holds question: expected prompt or messages"):
        prompt_text({"question": "?"}, TOKENIZER)
    messages = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "yes"}]
    assert prompt_text({"messages": messages}, TOKENIZER) == prompt_text(EXAMPLES[0], TOKENIZER)


def test_a_policy_that_has_diverged():
    base, delta = start()
    broken = jax.tree.map(lambda x: x * jnp.nan, delta)
    roll_out = make_rollout(CONFIG, TOKENIZER, vowels, SAMPLING)
    with pytest.raises(ValueError, match="logits are not numbers in answer 0"):
        roll_out(broken, base, EXAMPLES, jax.random.key(0))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo"])
def test_a_setting_out_of_range_is_refused(name):
    make = training.LOSSES[name].make
    for setting, value in {"clip": 1.5, "clip_high": -1, "kl": -0.1, "temperature": 0}.items():
        with pytest.raises(ValueError, match=rf"{name}_loss\({setting}={value}\): expected"):
            make(small.CONFIG, **{setting: value})
    with pytest.raises(ValueError, match=r"dr_grpo_loss\(tokens=0\)"):
        training.dr_grpo_loss(small.CONFIG, tokens=0)
    with pytest.raises(ValueError, match="updates=0: expected at least 1"):
        policy_step(None, None, READ, updates=0)
