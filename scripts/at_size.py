"""A training step at a model's real size over random weights: what the benchmarks at size share."""

import importlib.metadata
import itertools
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))

import lora_jax as lora
from lora_jax import training
from lora_jax.models import DecoderConfig, llama
from lora_jax.models.remat import Remat
from lora_jax.quant import quantize
from lora_jax.weights import PyTree

RANK = 16
OPTIMIZER = training.adamw(steps=10_000, schedule="constant")


def abstract_base(config: DecoderConfig, quantized: bool) -> PyTree:
    """The shapes of a base in bfloat16, its linear layers in doubly quantised NF4 or not."""

    def make(key):
        params = llama.init(config, key=key, dtype=jnp.bfloat16)
        return quantize(params, "nf4") if quantized else params

    return jax.eval_shape(make, jax.random.key(0))


def random_base(config: DecoderConfig, quantized: bool) -> PyTree:
    """A random base, made on the device leaf by leaf and layer by layer: nothing larger is ever
    there. Codes are random bytes and all else is normal, which is as quick as real weights."""
    base = abstract_base(config, quantized)
    seeds = itertools.count()
    return jax.tree.map(lambda leaf: _random(leaf.shape, leaf.dtype, next(seeds)), base)


@partial(jax.jit, static_argnums=(0, 1))
def _random(shape: tuple[int, ...], dtype: Any, seed: int) -> jax.Array:
    def one(key, shape):
        if dtype == jnp.uint8:
            return jax.random.bits(key, shape, dtype)
        return jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)

    key = jax.random.key(seed)
    if len(shape) < 3:
        return one(key, shape)
    return jax.lax.map(partial(one, shape=shape[1:]), jax.random.split(key, shape[0]))


def states_of(base: PyTree, arms: int) -> list[training.TrainState]:
    """States of LoRA on all linear layers at rank 16, of different seeds and learning rates."""

    def state(seed, base):
        _, delta = lora.lora_transform(base, lora.LoRA(rank=RANK), key=jax.random.key(seed))
        return training.init_state(delta, OPTIMIZER, learning_rate=1e-4 * (1 + seed), seed=seed)

    return [jax.jit(state, static_argnums=0)(seed, base) for seed in range(arms)]


def batch(config: DecoderConfig, rows: int, length: int) -> dict[str, jax.Array]:
    """Random tokens, every one of which counts; one example a row."""
    tokens = jax.random.randint(jax.random.key(1), (rows, length + 1), 0, config.vocab_size)
    return training.next_token_batch(tokens)


def step_of(config: DecoderConfig, remat: Remat) -> Callable:
    """The step to be jitted, `(state, base, batch) -> (state, metrics)`."""
    return training.train_step(training.next_token_loss(config, remat=remat), OPTIMIZER)


def model_flops_per_token(config: DecoderConfig, length: int) -> float:
    """FLOPs that a LoRA step needs for a token, whatever an implementation recomputes.

    `4 P + 6 p + 6 L N H T`: the P weights of the products with the base, head included, forward and
    for the gradient of their input; the p weights of the adapters, for their own gradient as well;
    and causal attention over rows of T tokens, of which half the scores count.
    """
    base = abstract_base(config, quantized=False)
    layers = base["layers"]
    matrices = sum(leaf.size for part in ("attn", "mlp") for leaf in layers[part].values())
    matrices += config.vocab_size * config.hidden_size
    _, delta = jax.eval_shape(
        lambda: lora.lora_transform(base, lora.LoRA(rank=RANK), key=jax.random.key(0))
    )
    adapters = lora.describe(base, delta).trainable_params
    scores = config.num_layers * config.num_heads * config.head_dim * length
    return 4 * matrices + 6 * adapters + 6 * scores


def versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "libtpu", "jax_cuda13_plugin", "nvidia_cudnn_cu13")
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
