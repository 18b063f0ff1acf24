"""Times `adapt` beside the same model written with `linear`, and its tracing beside a model's.

    python scripts/bench_adapt.py

The model is `lora_jax.models.llama` with eight layers of SmolLM2-135M's width: as it is, it takes
adapted weights by itself; under `adapt` it is handed arrays, as a foreign model would be. LoRA
r = 16 on all linear layers, value and gradient, 4 rows of 64 tokens. The two alternate in one
process, and each figure is the median of the ratios of neighbours. A Flax transformer of twelve
unrolled layers stands for a library whose own tracing is slow.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import flax.linen as nn
import jax
import jax.numpy as jnp

import lora_jax as lora
from lora_jax.models import SHAPES, llama

LORA = lora.LoRA(rank=16)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> float:
    """The median of `ours / theirs` over rounds in which the two take turns."""
    seconds(ours), seconds(theirs)
    return statistics.median(seconds(ours) / seconds(theirs) for _ in range(rounds))


def running(rounds: int) -> dict[str, float]:
    config = dataclasses.replace(SHAPES["smollm2-135m"], num_layers=8)
    params = jax.jit(lambda key: llama.init(config, key=key))(jax.random.key(0))
    base, delta = lora.lora_transform(params, LORA, key=jax.random.key(1))
    tokens = jnp.arange(256).reshape(4, 64)

    def step(forward):
        def loss(delta, base):
            logits = forward(lora.bind(base, delta), tokens, config)
            return jax.nn.logsumexp(logits, axis=-1).mean()

        return jax.jit(jax.value_and_grad(loss)).lower(delta, base).compile()

    ours, theirs = step(lora.adapt(llama.forward)), step(llama.forward)
    flops = [compiled.cost_analysis()["flops"] for compiled in (ours, theirs)]
    return {
        "run time": ratio(lambda: ours(delta, base), lambda: theirs(delta, base), rounds),
        "FLOPs": flops[0] / flops[1],
    }


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x += nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
        return x + nn.Dense(64)(nn.gelu(nn.Dense(256)(nn.LayerNorm()(x))))


def tracing(rounds: int) -> dict[str, float]:
    model = nn.Sequential([nn.Embed(100, 64), *(Block() for _ in range(12)), nn.Dense(100)])
    tokens = jnp.arange(64).reshape(4, 16)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    layouts = lora.infer_layouts(model.apply, params, tokens)

    def weights(params):
        base, delta = lora.lora_transform(params, LORA, key=jax.random.key(1), layouts=layouts)
        return lora.bind(base, delta)

    adapted = jax.eval_shape(weights, params)

    def traced(fn, params):
        return lambda: jax.make_jaxpr(lambda p: fn(p, tokens))(params).out_avals

    return {
        "tracing": ratio(
            traced(lora.adapt(model.apply), adapted), traced(model.apply, params), rounds
        )
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a JSON file for the record")
    args = parser.parse_args()
    found = running(args.rounds) | tracing(args.rounds)
    for name, value in found.items():
        print(f"{name:<10} {value:.3f} of the same model without adapt")
    if args.out:
        versions = {"jax": jax.__version__, "python": platform.python_version()}
        record = {"ratios": found, "versions": versions, "device": jax.devices()[0].device_kind}
        args.out.write_text(json.dumps(record | {"date": time.strftime("%F")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
