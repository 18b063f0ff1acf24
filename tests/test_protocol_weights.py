"""What else the protocol has to hold: quantised weights under an adapter, and prompts."""

import dataclasses

import cases
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, assert_same_draws, moved

import lora_jax as lora
from lora_jax.methods import Extra, Method
from lora_jax.models import llama
from lora_jax.schema import leaf

CONFIG, PARAMS, TOKENS = cases.llama_case(
    hidden_size=32, intermediate_size=64, num_heads=8, num_kv_heads=4
)
FORWARD = jax.jit(llama.forward, static_argnums=2)


@flax.struct.dataclass
class Int8(lora.Weight):
    """`codes * scale`, with one scale for each output column."""

    codes: jax.Array
    scale: jax.Array

    shape = property(lambda self: self.codes.shape)
    dtype = property(lambda self: self.scale.dtype)
    T = property(lambda self: jnp.swapaxes(self.dense(), -1, -2))

    def dense(self):
        return self.codes.astype(self.dtype) * self.scale

    def linear(self, x):
        return x @ self.dense()

    def embed(self, tokens):
        return self.dense()[tokens]


def quantized(leaf):
    scale = jnp.abs(leaf).max(axis=-2, keepdims=True) / 127
    return Int8(jnp.round(leaf / scale).astype(jnp.int8), scale)


def quantize(params):
    layers = {
        **params["layers"],
        "attn": jax.tree.map(quantized, params["layers"]["attn"]),
        "mlp": jax.tree.map(quantized, params["layers"]["mlp"]),
    }
    return {**params, "layers": layers, "embed": quantized(params["embed"])}


BASES = {
    "toy": quantize(PARAMS),
    **{
        format: lora.quantize(
            PARAMS, format, targets=("all-linear", "embed"), **cases.format_options(format, 8)
        )
        for format in cases.STORAGES
    },
}


@pytest.fixture(params=cases.STORAGES)
def base(request):
    return BASES[request.param]


@jax.jit
def dense_form(base):
    return jax.tree.map(
        lambda w: w.dense() if isinstance(w, lora.Weight) else w,
        base,
        is_leaf=lambda w: isinstance(w, lora.Weight),
    )


def delta_over(base, method=None, **kwargs):
    kwargs = {"targets": ("q_proj", "down_proj")} | kwargs
    return cases.llama_delta(base, method or lora.LoRA(rank=2), **kwargs)


@pytest.mark.slow
def test_quantised_llama_runs_unadapted(base):
    ours, theirs = FORWARD(base, TOKENS, CONFIG), FORWARD(dense_form(base), TOKENS, CONFIG)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_draws_do_not_depend_on_quantisation(base):
    assert_same_draws(delta_over(base), delta_over(PARAMS))


@pytest.mark.parametrize("name", BASES)
def test_lora_over_a_quantised_llama_is_lora_over_its_dense_form(name):
    base = BASES[name]
    delta = delta_over(base)
    ours = FORWARD(lora.bind(base, delta), TOKENS, CONFIG)
    theirs = FORWARD(lora.bind(dense_form(base), delta), TOKENS, CONFIG)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_merging_dequantises_the_adapted_weights_alone(base):
    delta = delta_over(base, targets="q_proj")
    merged = lora.merge(base, delta)
    attention = merged["layers"]["attn"]
    assert type(attention["k_proj"]) is type(base["layers"]["attn"]["k_proj"])
    assert isinstance(attention["q_proj"], jax.Array)
    ours = FORWARD(merged, TOKENS, CONFIG)
    assert_close(ours, FORWARD(lora.bind(base, delta), TOKENS, CONFIG), rtol=1e-3, atol=1e-5)


def test_gradients_through_a_quantised_base(base):
    delta = delta_over(base)

    def loss(delta, base, remat="none"):
        weights = lora.bind(base, delta)
        return (llama.forward(weights, TOKENS, CONFIG, remat=remat) ** 2).mean()

    gradient = jax.jit(jax.grad(loss), static_argnums=2)
    expected = gradient(delta, dense_form(base))
    assert_close(gradient(delta, base, "elementwise"), expected, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_dropout_over_a_quantised_base(base):
    delta, key = delta_over(base, lora.LoRA(rank=2, dropout=0.5)), jax.random.key(3)
    ours = FORWARD(lora.bind(base, delta, dropout_key=key), TOKENS, CONFIG)
    theirs = FORWARD(lora.bind(dense_form(base), delta, dropout_key=key), TOKENS, CONFIG)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_sweep_shares_a_quantised_base(base):
    deltas = [delta_over(base, seed=i) for i in range(2)]
    run = jax.jit(jax.vmap(lambda d, b: llama.forward(lora.bind(b, d), TOKENS, CONFIG), (0, None)))
    for output, delta in zip(run(lora.stack(deltas), base), deltas, strict=True):
        alone = FORWARD(lora.bind(base, delta), TOKENS, CONFIG)
        assert_close(output, alone, rtol=1e-3, atol=1e-5)


def test_rows_use_their_own_adapter_over_a_quantised_base(base):
    deltas = [delta_over(base, seed=i) for i in range(2)]
    weights = lora.bind(base, lora.stack(deltas), adapter_ids=jnp.array([1, 0]))
    together = FORWARD(weights, TOKENS, CONFIG)
    solo = [FORWARD(lora.bind(base, d), TOKENS, CONFIG) for d in deltas]
    assert_close(together, jnp.stack([solo[1][0], solo[0][1]]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", BASES)
def test_lora_on_a_quantised_tied_embedding(name):
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    base = {name: leaf for name, leaf in BASES[name].items() if name != "lm_head"}
    delta = delta_over(base, targets="embed")
    ours = FORWARD(lora.bind(base, delta), TOKENS, tied)
    assert_close(ours, FORWARD(lora.merge(base, delta), TOKENS, tied), rtol=1e-3, atol=1e-5)


def test_full_over_a_quantised_base(base):
    delta = delta_over(base, lora.Full(), targets="q_proj")
    ours = FORWARD(lora.bind(base, delta), TOKENS, CONFIG)
    assert_close(ours, FORWARD(lora.merge(base, delta), TOKENS, CONFIG), rtol=1e-3, atol=1e-5)


@pytest.mark.sampled
def test_every_method_over_a_quantised_base_is_that_method_over_its_dense_form(method):
    dense = {"layers": {"q_proj": cases.stacked().params["layers"]["q_proj"]}}
    base = {"layers": {"q_proj": quantized(dense["layers"]["q_proj"])}}
    dense["layers"]["q_proj"] = base["layers"]["q_proj"].dense()
    deltas = [moved(lora.lora_transform(tree, method, key=jax.random.key(0))[1])
              for tree in (base, dense)]  # fmt: skip
    assert_close(*deltas)
    apply = cases.stacked().apply
    ours, theirs = (apply(lora.bind(tree, deltas[1]), cases.X) for tree in (base, dense))
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_counts_are_logical(base):
    found = lora.describe(base, delta_over(base))
    plain = lora.describe(PARAMS, delta_over(PARAMS))
    assert found == plain


@flax.struct.dataclass
class Prompt(Extra):
    """Rows that a model reads in front of the embedded tokens."""

    own_axes = ("row", "width")

    rows: jax.Array = leaf("stack row width")


def read(weights, tokens):
    """A toy model that puts the prompt, if there is one, in front."""
    x = lora.embed(tokens, weights["embed"])
    if "prompt" in weights:
        x = jnp.concatenate([weights["prompt"].rows, x])
    return lora.linear(jnp.cumsum(x, axis=0), weights["out"])


TREE = {"embed": cases.normal(0, 9, 6), "out": cases.normal(1, 6, 4)}
PROMPT = {"prompt": Prompt(cases.normal(2, 3, 6))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyPrompt(Method):
    """Adapts no weight: its rows are as wide as the table that it targets."""

    rows: int

    def init_node(self, path, weight, *, layout, key):
        return None

    def extras(self, weights, *, layouts, key):
        [table] = weights.values()
        return {"prompt": Prompt(jax.random.normal(key, (self.rows, table.shape[-1])))}


def test_a_prompt_alone_is_a_method():
    method = ToyPrompt(rows=3)
    base, delta = lora.lora_transform(TREE, method, targets="embed", key=jax.random.key(0))
    assert base is not None and set(delta) == {"prompt"}
    assert lora.describe(base, delta).trainable_params == delta["prompt"].rows.size
    assert set(lora.bind(base, delta)) == {"embed", "out", "prompt"}


IDS = jnp.array([1, 7, 2])


def test_a_prompt_enters_the_weights():
    weights = lora.bind(TREE, PROMPT)
    assert set(weights) == {"embed", "out", "prompt"} and set(TREE) == {"embed", "out"}
    x = jnp.concatenate([PROMPT["prompt"].rows, TREE["embed"][IDS]])
    assert_close(read(weights, IDS), jnp.cumsum(x, axis=0) @ TREE["out"], atol=5e-6)


def test_a_prompt_trains_beside_lora():
    base, delta = lora.lora_transform(TREE, lora.LoRA(rank=2), targets="out", key=jax.random.key(0))
    delta = {**moved(delta), **PROMPT}
    gradient = jax.grad(lambda d: (read(lora.bind(base, d), IDS) ** 2).sum())(delta)
    assert np.all(gradient["prompt"].rows) and np.any(gradient["out"].b)
    assert jax.tree.leaves(lora.trainable_mask(delta["prompt"])) == [True]
    assert lora.describe(base, delta).trainable_params == 2 * (6 + 4) + 18


def test_prompts_stack_through_vmap():
    other = {"prompt": Prompt(cases.normal(3, 3, 6))}
    outputs = jax.vmap(lambda d: read(lora.bind(TREE, d), IDS))(lora.stack([PROMPT, other]))
    assert_close(outputs[1], read(lora.bind(TREE, other), IDS))


def test_a_prompt_has_no_merged_form():
    with pytest.raises(ValueError, match="prompt: Prompt has no merged form"):
        lora.merge(TREE, PROMPT)


def test_a_prompt_wants_a_tree_of_dicts():
    with pytest.raises(ValueError, match="prompt is a parameter that the model reads by itself"):
        lora.bind([TREE["out"]], PROMPT)
