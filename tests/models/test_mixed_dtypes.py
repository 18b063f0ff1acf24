"""Trees whose leaves are of several dtypes, under strict promotion: what runs through the model
keeps the dtype of the embedding, and every leaf counts with all of its bits."""

import functools
import itertools

import cases
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.models import llama
from lora_jax.models.generate import generate
from lora_jax.models.mixed_dtypes import read_out
from lora_jax.training import token_losses

CONFIG, PARAMS, TOKENS = cases.llama_case(qkv_bias=True, qk_norm=True, num_layers=2)
GROUPS = ("embed", "norm", "bias", "proj", "lm_head")
KINDS = (jnp.float32, jnp.bfloat16, jnp.float16)
TWO = list(itertools.product(KINDS[:2], repeat=len(GROUPS)))
THREE = [(jnp.float16, jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.float16),
         (jnp.bfloat16, jnp.float16, jnp.float16, jnp.float32, jnp.bfloat16)]  # fmt: skip
NORMS_ALONE = (jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.bfloat16, jnp.bfloat16)


def mixed(dtypes, params=PARAMS):
    """The params with each group of leaves in a dtype of its own."""
    chosen = dict(zip(GROUPS, dtypes, strict=True))

    def cast(path, leaf):
        name = lora.paths.path_name(path)
        return leaf.astype(next(kind for group, kind in chosen.items() if group in name))

    return jax.tree_util.tree_map_with_path(cast, params)


def assert_keeps(function, dtype, *arguments):
    """No scan carries, and no layer's attention sees, floats of another dtype but a cache that it
    was given; the results."""
    caches = [leaf for leaf in arguments if isinstance(leaf, llama.Cache)]
    own = {(cache.k.shape, cache.k.dtype) for cache in caches}
    program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    scans = [eqn for eqn in jaxprs.equations(program) if eqn.primitive.name == "scan"]
    assert scans
    for eqn in scans:
        # The carry comes first of what a scan returns; what it stacks has the scan's axis more.
        body = [
            var.aval for var in getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"]).outvars
        ]
        carried = [
            new.dtype
            for new, var in zip(body, eqn.outvars, strict=True)
            if new.shape == var.aval.shape and jnp.issubdtype(new.dtype, jnp.floating)
            if (new.shape, new.dtype) not in own
        ]
        assert set(carried) <= {dtype}
    return shapes


def wider(*dtypes):
    return np.result_type(*dtypes) if len({*dtypes}) == 1 else jnp.dtype("float32")


@pytest.mark.parametrize("tied", [False, True])
def test_every_mix_keeps_the_embeddings_dtype(tied):
    forward = functools.partial(llama.forward, config=CONFIG)
    cache = functools.partial(llama.start_cache, config=CONFIG, batch=2, length=9)
    for dtypes in (TWO[::4] if tied else TWO) + THREE:
        params = mixed(dtypes)
        if tied:
            params.pop("lm_head")
        dtype = jnp.dtype(params["embed"].dtype)
        logits = assert_keeps(lambda p, t: forward(p, t), dtype, params, TOKENS)
        assert logits.dtype == (dtype if tied else wider(dtype, params["lm_head"].dtype))
        empty = jax.eval_shape(cache, params)
        assert empty.k.dtype == empty.v.dtype == dtype
        for kind in (dtype, jnp.dtype("float32")) if tied else (dtype,):
            given = llama.init_cache(CONFIG, 2, 9, kind)
            read = functools.partial(llama.extend, config=CONFIG)
            states, after = assert_keeps(read, dtype, params, TOKENS, given)
            assert states.dtype == dtype and after.k.dtype == after.v.dtype == kind


METHODS = {
    "lora": lora.LoRA(rank=2, dropout=0.5),
    "dora": lora.DoRA(rank=2, dropout=0.5),
    "vera": lora.VeRA(rank=2),
    "adalora": lora.AdaLoRA(rank=2, target_rank=1, total_steps=4),
    "ia3": lora.IA3(),
    "bottleneck": lora.Bottleneck(size=2),
    "full": lora.Full(),
    "read": {"embed": lora.Prompt(length=2), "k_proj": lora.Prefix(length=2, hidden=3)},
    "table": {"embed": lora.LoRA(rank=2), "lm_head": lora.LoRA(rank=2)},
}


QUICK = [(name, "array", THREE[0]) for name in METHODS] + [("lora", "nf4", NORMS_ALONE)]
OTHERS = [
    pytest.param(*cell, marks=pytest.mark.slow)
    for cell in itertools.product(METHODS, ("array", "nf4"), [NORMS_ALONE, *THREE, TWO[5]])
    if cell not in QUICK
]


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "format", "dtypes"), QUICK + OTHERS)
def test_adapters_over_a_mix(name, format, dtypes):
    """The logits, a gradient through the loss, and what is generated."""
    params = mixed(dtypes)
    if format != "array":
        params = lora.quantize(params, format, block_size=8)
    method, dtype = METHODS[name], jnp.dtype(params["embed"].dtype)

    def run(params, key):
        base, delta = lora.lora_transform(params, method, key=key)

        def loss(delta):
            weights = lora.bind(base, delta, dropout_key=key)
            hidden = llama.hidden_states(weights, TOKENS, CONFIG)
            head = llama.output_head(weights)
            logits = read_out(hidden, head)
            return token_losses(hidden, head, TOKENS, TOKENS > 0, chunk=4)[0], logits

        slopes, logits = jax.grad(loss, has_aux=True)(delta)
        return slopes, logits, written(lora.bind(base, delta), key)

    def written(weights, key):
        if name not in ("lora", "read", "table"):
            return jnp.zeros(3, jnp.int32)
        lengths, sampled = jnp.array([7, 3]), {"temperature": 0.7, "top_p": 0.9, "key": key}
        return generate(weights, TOKENS, lengths, CONFIG, max_new_tokens=2, eos_id=1, **sampled)

    slopes, logits, tokens = jax.eval_shape(run, params, jax.random.key(0))
    assert logits.dtype == wider(dtype, params["lm_head"].dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(slopes)} == {jnp.dtype("float32")}
    assert tokens.dtype == jnp.int32


@pytest.mark.sampled
@pytest.mark.parametrize("group", GROUPS)
def test_a_float32_leaf_counts_in_full_beside_bfloat16(group):
    """One of what float32 alone can tell apart, in the group that is not rounded."""
    kinds = tuple(jnp.float32 if name == group else jnp.bfloat16 for name in GROUPS)
    params = mixed(kinds)

    def nudged(path, leaf):
        named = group in lora.paths.path_name(path)
        return leaf + 0.004 * jnp.abs(leaf) if named and leaf.dtype == jnp.float32 else leaf

    change = jax.tree_util.tree_map_with_path(nudged, params)
    states = jax.jit(lambda p: llama.forward(p, TOKENS, CONFIG).astype(jnp.float32))
    exact = jax.jit(lambda p: llama.forward(p, TOKENS, CONFIG))(PARAMS)
    assert np.abs(states(params) - exact).max() < 0.1 * np.abs(exact).max()
    assert np.any(states(change) != states(params))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_float32_norms_alone(dtype):
    """The scale is multiplied in float32 and rounded once, the stream stays what it was."""
    x, scale = cases.normal(0, 3, 5, 8).astype(dtype), 1 + 1e-3 * cases.normal(1, 8)
    ours = llama.rms_norm(x, scale, CONFIG)
    unit = llama.rms_norm(x, jnp.ones(8, dtype), CONFIG)
    assert ours.dtype == dtype
    expected = np.asarray(unit, np.float32) * np.asarray(scale)
    np.testing.assert_array_equal(ours, expected.astype(dtype))


def test_a_cache_of_another_dtype_holds_what_is_read():
    params = mixed(NORMS_ALONE)
    read = jax.jit(llama.extend, static_argnums=3)
    ours, theirs = (
        read(params, TOKENS, llama.init_cache(CONFIG, 2, 7, kind), CONFIG)[0]
        for kind in (jnp.float32, jnp.bfloat16)
    )
    np.testing.assert_array_equal(ours, theirs)
