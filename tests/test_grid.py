"""Every method x base format x way to run a model: what DESIGN's properties promise of each cell.

The methods are those that the library exports, the formats those that `quantize` makes. A cell is
one compiled function of the base and the delta, called with a fresh delta and with a moved one.
"""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import REGISTRY, assert_close, moved, normal

import lora_jax as lora
from lora_jax import methods
from lora_jax.methods import Method
from lora_jax.transform import delta_nodes
from lora_jax.weights import scan_layers

EXPORTED = [
    thing
    for thing in vars(methods).values()
    if inspect.isclass(thing) and issubclass(thing, Method) and thing is not Method
]
FORMATS = {
    "array": {},
    "nf4": {"format": "nf4"},
    "nf4 single": {"format": "nf4", "double_quant": False},
    "int8": {"format": "int8"},
}
# What the default run tries; the rest is slow. Other tests run every method plainly.
QUICK = {("array", "adapt"), ("array", "vmap"), ("nf4", "remat")}
TOKENS = jnp.array([[1, 4, 2], [0, 3, 3]])
LAYERS = 2


def test_every_exported_method_has_a_place_in_the_grid():
    assert set(EXPORTED) == set(REGISTRY)


def layer(x, weights, product=lora.linear):
    """Reads the keys and values of a prefix, if there is one, as an attention layer would."""
    y = jnp.tanh(product(x, weights["k_proj"]))
    if "prefix" in weights:
        scores = jax.nn.softmax(y @ weights["prefix"].k.T, axis=-1)
        y = y + scores @ weights["prefix"].v
    return y


def embedded(tokens, weights, rows=lora.embed):
    x = rows(tokens, weights["embed"])
    if "prompt" not in weights:
        return x
    prompt = weights["prompt"].rows
    return jnp.concatenate([jnp.broadcast_to(prompt, (x.shape[0], *prompt.shape)), x], axis=1)


def plain(weights, tokens):
    x = embedded(tokens, weights)
    for index in range(LAYERS):
        x = layer(x, weights["layers"][str(index)])
    return x


def scan(weights, tokens, wrap=lambda body: body):
    def body(x, weights):
        return layer(x, weights), None

    return scan_layers(wrap(body), embedded(tokens, weights), weights["layers"])[0]


def remat(weights, tokens):
    return scan(weights, tokens, wrap=jax.checkpoint)


@lora.adapt
def adapt(weights, tokens):
    """A model that knows nothing of us."""

    def body(x, weights):
        return layer(x, weights, product=jnp.matmul), None

    x = embedded(tokens, weights, rows=lambda tokens, table: table[tokens])
    return jax.lax.scan(body, x, weights["layers"])[0]


WAYS = {"plain": plain, "adapt": adapt, "vmap": scan, "scan": scan, "remat": remat}


@functools.cache
def base_of(way: str, format: str):
    stacked = normal(0, LAYERS, 8, 8) / np.float32(np.sqrt(8))
    layers = {"k_proj": stacked}
    if way == "plain":
        layers = {str(index): {"k_proj": stacked[index]} for index in range(LAYERS)}
    params = {"embed": normal(1, 5, 8), "layers": layers}
    options = FORMATS[format]
    return lora.quantize(params, targets="k_proj", block_size=8, **options) if options else params


@functools.cache
def deltas_of(kind: type[Method], stacked: bool, format: str):
    """The base, a fresh delta and a moved one."""
    entry, params = REGISTRY[kind], base_of("scan" if stacked else "plain", format)
    method = entry.method if isinstance(entry.method, Method) else entry.method(params)
    transform = functools.partial(
        lora.lora_transform, method=method, targets=entry.targets, key=jax.random.key(0)
    )
    base, fresh = jax.jit(transform)(params)
    return base, fresh, moved(fresh)


def merges(delta) -> bool:
    """Whether every node says that it has a merged form, rather than why it has none."""
    names = {type(node).__name__ for node in delta_nodes(delta).values()}
    return not names & {"BottleneckNode", "FusionNode", "PromptNode", "PrefixNode"}


CELLS = [
    pytest.param(kind, format, way, marks=() if (format, way) in QUICK else pytest.mark.slow,
                 id=f"{kind.__name__}-{format}-{way}")
    for kind in EXPORTED for format in FORMATS for way in WAYS
]  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize(("kind", "format", "way"), CELLS)
def test_cell(kind, format, way):
    base, fresh, trained = deltas_of(kind, way != "plain", format)
    run, mergeable = WAYS[way], merges(fresh)

    def output(delta, base):
        if way != "vmap":
            return run(lora.bind(base, delta), TOKENS)
        pair = lora.stack([delta, jax.tree.map(jnp.zeros_like, delta)])
        return jax.vmap(lambda member: run(lora.bind(base, member), TOKENS))(pair)[0]

    @jax.jit
    @chex.assert_max_traces(n=1)  # the second call compiles nothing
    def cell(delta, base):
        def loss(delta, base):
            y = output(delta, base)
            return jnp.mean(y**2), y

        slopes, y = jax.grad(loss, (0, 1), has_aux=True, allow_int=True)(delta, base)
        merged = run(lora.merge(base, delta), TOKENS) if mergeable else y
        return y, slopes, merged, run(base, TOKENS)

    start, *_, untouched = jax.device_get(cell(fresh, base))
    y, (delta_slope, base_slope), merged, _ = jax.device_get(cell(trained, base))
    if not REGISTRY[kind].changes_at_once:
        assert_close(start, untouched, atol=5e-6)
    assert start.shape != y.shape or np.abs(y - start).max() > 1e-2
    assert_close(merged, y, rtol=1e-3, atol=2e-5)
    moving = jax.tree.map(lambda slope: bool(np.any(slope)), delta_slope)
    assert moving == lora.trainable_mask(trained)
    for slope in jax.tree.leaves(base_slope):
        assert slope.dtype == jax.dtypes.float0 or not np.any(slope)


@pytest.mark.sampled
@pytest.mark.parametrize("kind", EXPORTED)
def test_without_a_merged_form_there_is_an_error(kind):
    base, fresh, _ = deltas_of(kind, True, "array")
    if merges(fresh):
        lora.merge(base, fresh)
        return
    with pytest.raises(ValueError, match="has no merged form"):
        lora.merge(base, fresh)
