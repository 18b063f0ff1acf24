"""What a delta puts in front of the tokens: positions, packing, the cache, generation."""

import functools
import re

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, moved

import lora_jax as lora
from lora_jax.models import llama
from lora_jax.models.generate import generate
from lora_jax.paths import nest
from lora_jax.transform import delta_nodes

CONFIG, PARAMS, TOKENS = cases.llama_case()
KEY = jax.random.key(0)
FORWARD = jax.jit(llama.forward, static_argnums=2, static_argnames="remat")
METHODS = {
    "prompt": {"embed": lora.Prompt(length=3)},
    "prefix": {"k_proj": lora.Prefix(length=3)},
    "all": {"embed": lora.Prompt(length=2), "k_proj": lora.Prefix(length=2),
            "q_proj": lora.LoRA(rank=2)},
}  # fmt: skip


@functools.cache
def made(name, seed=1):
    make = jax.jit(lambda p: lora.lora_transform(p, METHODS[name], key=KEY)[1])
    return moved(make(PARAMS), seed, size=0.7)


def run(delta, tokens=TOKENS, **kwargs):
    return FORWARD(lora.bind(PARAMS, delta), tokens, CONFIG, **kwargs)


def test_packed_examples_all_see_it_and_nothing_else():
    """Each as if it were alone."""
    delta = made("all")
    packed = run(
        delta,
        jnp.concatenate([TOKENS[:1, :3], TOKENS[1:, :3]], axis=1),
        positions=jnp.array([[0, 1, 2, 0, 1, 2]]),
        segment_ids=jnp.array([[1, 1, 1, 2, 2, 2]]),
    )
    alone = run(delta)
    assert_close(packed[0, :3], alone[0, :3], rtol=1e-3, atol=2e-5)
    assert_close(packed[0, 3:], alone[1, :3], rtol=1e-3, atol=2e-5)
    assert alone.shape == (*TOKENS.shape, CONFIG.vocab_size)


def test_generation_reads_on_from_it():
    weights, lengths = lora.bind(PARAMS, made("all")), jnp.array([4, 3])
    write = jax.jit(functools.partial(generate, config=CONFIG, max_new_tokens=3, eos_id=-1))
    new = np.asarray(write(weights, TOKENS[:, :4], lengths))
    text = np.array(TOKENS)
    for row, length in enumerate(lengths):
        text[row, length : length + 3] = new[row]
    best = np.argmax(FORWARD(weights, jnp.asarray(text), CONFIG), axis=-1)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(new[row], best[row, length - 1 :][:3])


def test_rows_have_their_own():
    deltas = [made("all", seed) for seed in (1, 2)]
    weights = lora.bind(PARAMS, lora.stack(deltas), adapter_ids=jnp.array([1, 0]))
    expected = jnp.stack([run(deltas[1])[0], run(deltas[0])[1]])
    assert_close(FORWARD(weights, TOKENS, CONFIG), expected, rtol=1e-3, atol=2e-5)


def test_rows_have_their_own_encoded_prefix():
    method = {"k_proj": lora.Prefix(length=3, hidden=5)}
    delta = jax.jit(lambda p: lora.lora_transform(p, method, key=KEY)[1])(PARAMS)
    deltas = [moved(delta, seed) for seed in (1, 2)]
    prefix = lora.bind(PARAMS, lora.stack(deltas), adapter_ids=jnp.array([1, 0, 1]))
    alone = [lora.bind(PARAMS, delta)["layers"]["attn"]["prefix"] for delta in deltas]
    for row, i in enumerate([1, 0, 1]):
        assert_close(prefix["layers"]["attn"]["prefix"].k[:, row], alone[i].k)
        assert_close(prefix["layers"]["attn"]["prefix"].v[:, row], alone[i].v)


def test_stacks_through_vmap():
    deltas = [made("all", seed) for seed in (1, 2)]
    outputs = jax.jit(jax.vmap(run))(lora.stack(deltas))
    for output, delta in zip(outputs, deltas, strict=True):
        assert_close(output, run(delta), rtol=1e-3, atol=2e-5)


def test_all_that_trains_gets_a_gradient_with_and_without_remat():
    delta = made("all")

    def loss(delta, remat):
        return (run(delta, remat=remat) ** 2).mean()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain, again = (gradient(delta, remat) for remat in ("none", "full"))
    assert jax.tree.map(lambda g: bool(np.any(g)), plain) == lora.trainable_mask(delta)
    assert_close(again, plain, rtol=1e-3, atol=2e-5)


def test_described_and_without_merged_form():
    delta = made("all")
    rows = {row.path: row.trainable for row in lora.describe(PARAMS, delta).rows}
    assert rows["prompt"] == 2 * 16 and rows["layers/attn/prefix"] == 3 * 2 * 2 * 8
    with pytest.raises(ValueError, match="layers/attn/prefix: PrefixNode has no merged form"):
        lora.merge(PARAMS, delta)


def rows_of(**kwargs):
    method = lora.Prompt(**kwargs)
    return lora.lora_transform(PARAMS, method, targets="embed", key=KEY)[1]["prompt"].rows


def test_prompt_starts():
    chex.assert_trees_all_equal(
        rows_of(length=5, tokens=(3, 1)), PARAMS["embed"][jnp.array([3, 1, 3, 1, 3])]
    )
    chex.assert_trees_all_equal(rows_of(length=1, tokens=(3, 1)), PARAMS["embed"][jnp.array([3])])
    distances = np.abs(np.asarray(rows_of(length=4))[:, None] - np.asarray(PARAMS["embed"])[None])
    assert np.all(distances.max(-1).min(-1) == 0)  # each is a row of the table
    assert 0.9 < np.std(rows_of(length=100, init="normal")) < 1.1


def test_longer_than_the_context():
    short = cases.tiny_llama(context_length=8)
    for name in ("prompt", "prefix"):
        delta = lora.stack([made(name)])
        long = jax.tree.map(lambda x: jnp.repeat(x[0], 3, axis=-2), delta)
        with pytest.raises(ValueError, match="leave no token in the model's context of 8"):
            llama.forward(lora.bind(PARAMS, long), TOKENS, short)
        with pytest.raises(ValueError, match="a prefix or soft prompt takes 3"):
            generate(lora.bind(PARAMS, made(name)), TOKENS[:, :4], jnp.array([4, 4]), short,
                     max_new_tokens=2, eos_id=0)  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lora.Prompt(length=0), r"Prompt\(length=0\)"),
        (lambda: lora.Prompt(init="zeros"), "init='zeros'.*'vocab' or 'normal'"),
        (lambda: lora.Prompt(tokens=()), "no tokens"),
        (lambda: lora.Prefix(length=0), r"Prefix\(length=0\)"),
        (lambda: lora.Prefix(hidden=0), r"Prefix\(hidden=0\)"),
    ],
)
def test_bad_hyperparameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("targets", [("embed", "lm_head"), "k_proj"])
def test_a_prompt_wants_one_table(targets):
    with pytest.raises(ValueError, match="one embedding table .*Target the table"):
        lora.lora_transform(PARAMS, lora.Prompt(), targets=targets, key=KEY)


NO_KEYS = {
    "all-linear": "layers/attn/k_proj and layers/attn/(?!k_proj)|not by its name",
    "attention": "not by its name|in one module",
    "q_proj": "layers/attn/q_proj: a Prefix takes the width .*keys.*k_proj",
    "o_proj": "layers/attn/o_proj: .*k_proj",
    "up_proj": "layers/mlp/up_proj: .*k_proj",
    "embed": "embed: .*k_proj",
    "k_proj|v_proj": "layers/attn/k_proj and layers/attn/v_proj are targets of a Prefix in one mod",
}


@pytest.mark.parametrize("targets", NO_KEYS)
def test_a_prefix_wants_one_key_projection_in_each_attention(targets):
    shapes = jax.eval_shape(lambda: PARAMS)
    with pytest.raises(ValueError, match=NO_KEYS[targets]):
        lora.lora_transform(shapes, lora.Prefix(length=3), targets=targets, key=KEY)


def tree(*paths):
    return nest({path: jax.ShapeDtypeStruct((6, 4), jnp.float32) for path in paths})


FOREIGN = {  # whether a prefix can stand there
    "flax": (("l0/attn/key/kernel", "l1/attn/key/kernel"), True),
    "haiku": (("l0/mha/value/w", "l1/mha/value/w"), True),
    "llama": (("layers/0/attention/wk/weight", "layers/1/attention/wk/weight"), True),
    "hugging face": (("model/layers/0/self_attn/v_proj/weight",), True),
    "plain": (("layers/0/k", "layers/1/k"), True),
    "own name": (("layers/0/w", "layers/1/w"), True),
    "both": (("l0/attn/key/kernel", "l0/attn/value/kernel"), False),
    "query": (("l0/attn/query/kernel",), False),
    "fused": (("h/0/attn/c_attn/kernel",), False),
    "mlp": (("l0/mlp/Dense_0/kernel",), False),
    "own names": (("layers/0/w", "layers/0/v2"), False),
    "head": (("lm_head/kernel",), False),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_prefixes_of_trees_by_other_names(name):
    paths, fits = FOREIGN[name]
    make = lambda: lora.lora_transform(  # noqa: E731
        tree(*paths), lora.Prefix(length=3), targets=".*", key=KEY
    )
    if fits:
        found = delta_nodes(make()[1])
        assert list(found) == [f"{path.rpartition('/')[0]}/prefix" for path in paths]
    else:
        with pytest.raises(ValueError, match="Target the key projections alone"):
            make()


def test_what_a_llama_does_not_read():
    prefix = made("prefix")["layers"]["attn"]["prefix"]
    unread = {"layers": {"mlp": {"prefix": prefix}}}
    wide = {"layers": {"attn": {"prefix": jax.tree.map(lambda x: jnp.tile(x, 2), prefix)}}}
    for delta, message in (
        (unread, "layers/mlp/prefix: a PrefixNode stands where this model reads none"),
        (wide, "layers/attn/prefix is 16 wide, the keys of this model are 8, 2 heads of 4.*k_proj"),
    ):
        weights = lora.bind(PARAMS, delta)
        with pytest.raises(ValueError, match=message):
            llama.forward(weights, TOKENS, CONFIG)
        with pytest.raises(ValueError, match=message):
            generate(weights, TOKENS, jnp.array([4, 4]), CONFIG, max_new_tokens=2, eos_id=0)


VERA = lora.VeRA(rank=2)
TAKEN = {
    "prompt": ({"prompt": PARAMS["norm"]}, lora.Prompt(length=2), "embed", "prompt"),
    "prompts": ({"prompt": {"table": PARAMS["norm"]}}, lora.Prompt(length=2), "embed", "prompt"),
    "prefix": ({"layers": PARAMS["layers"] | {"attn": PARAMS["layers"]["attn"] | {
        "prefix": PARAMS["norm"]}}}, lora.Prefix(length=2), "k_proj", "layers/attn/prefix"),
    "vera": ({VERA.projection: PARAMS["norm"]}, VERA, "q_proj", VERA.projection),
}  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize("name", TAKEN)
def test_a_leaf_of_the_users_is_not_overwritten(name):
    more, method, targets, place = TAKEN[name]
    with pytest.raises(ValueError, match=f"^{place}: a .* of the delta .*params.*'{place}"):
        lora.lora_transform(PARAMS | more, method, targets=targets, key=KEY)
    delta = lora.lora_transform(PARAMS, method, targets=targets, key=KEY)[1]
    with pytest.raises(ValueError, match=f"^{place}: a .* of the delta .*params.*'{place}"):
        lora.bind(PARAMS | more, delta)


def test_weights_are_bound_once():
    weights = lora.bind(PARAMS, made("prompt"))
    with pytest.raises(ValueError, match="prompt: a PromptNode .*'prompt/rows'"):
        lora.bind(weights, made("prompt"))


@pytest.mark.parametrize("methods", [
    {"embed": lora.Prompt(length=2), "lm_head": lora.Prompt(length=3)},
    {"k_proj": lora.Prefix(length=2), "v_proj": lora.Prefix(length=3)},
])  # fmt: skip
def test_two_of_one_place_are_one_too_many(methods):
    one, other = methods.values()
    message = f"both {re.escape(str(one))} and {re.escape(str(other))} put a"
    with pytest.raises(ValueError, match=message):
        lora.lora_transform(PARAMS, methods, key=KEY)
