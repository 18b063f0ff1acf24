"""Times a batched sweep beside the same arms in turn, at size, on one accelerator.

    pip install -r requirements.txt "jax[cuda13]" && python scripts/bench_sweep.py

Arms are LoRA on all linear layers of an 8B shape with random weights, one base for all of them, and
one row of `--tokens` for each step of an arm. Steps of all arms, in one batch and in turn,
alternate; the medians count.

Without the hardware, `--compile-for=v5e` prints the FLOPs of both ways and the bytes that they
move, as that chip's compiler counts them (`requirements-aot.txt`, JAX_PLATFORMS=cpu); a GPU's says
nothing. A loop counts once there, so that programs of one and two unrolled layers give what a layer
adds; the loss takes all positions in one chunk. Kernels' own work is not counted.
`--shape=tiny` runs on any machine, to try the script; its times mean nothing and are not written.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import at_size
import jax
from jax.experimental import topologies

from lora_jax import training
from lora_jax.models import SHAPES, DecoderConfig
from lora_jax.training.sweep import Mode, make_sweep

MODES: tuple[Mode, ...] = ("in_turn", "batched")


def measure(config: DecoderConfig, quantized: bool, arms: int, tokens: int, blocks: int) -> dict:
    """Seconds of a step of all arms, either way, and how much sooner the batch is done."""
    base = at_size.random_base(config, quantized)
    batch = at_size.batch(config, 1, tokens)
    states = at_size.states_of(base, arms)
    loss = training.next_token_loss(config)

    def evaluate(delta, base, batch):
        return loss(delta, base, batch, None)

    sweeps, packed = {}, {}
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for mode in MODES:
        sweeps[mode] = make_sweep(at_size.step_of(config, "elementwise"), evaluate, mode)
        packed[mode] = sweeps[mode].pack(states)
    for block in range(blocks + 1):
        for mode in MODES:
            start = time.perf_counter()
            packed[mode], metrics = sweeps[mode].step(packed[mode], base, batch, [True] * arms)
            jax.block_until_ready((packed[mode], metrics))
            if block:  # the first compiles
                seconds[mode].append(time.perf_counter() - start)
    medians = {mode: statistics.median(taken) for mode, taken in seconds.items()}
    return {
        **{f"{mode}_seconds": round(median, 5) for mode, median in medians.items()},
        "in_turn_over_batched": round(medians["in_turn"] / medians["batched"], 3),
    }


def counted(config: DecoderConfig, quantized: bool, arms: int, tokens: int, chip: str) -> dict:
    """FLOPs and bytes of a step of all arms, either way, from the compiler of `chip`."""
    mesh, platform = target(chip)
    one, two = (
        {
            mode: costs(dataclasses.replace(config, num_layers=layers), quantized, count, tokens,
                        mesh, platform)
            for mode, count in (("in_turn", None), ("batched", arms))
        }
        for layers in (1, 2)
    )  # fmt: skip
    record: dict[str, Any] = {}
    for quantity in ("flops", "bytes accessed"):
        name = quantity.split()[0]
        for mode in MODES:
            a_layer = two[mode][quantity] - one[mode][quantity]
            of_one = one[mode][quantity] + (config.num_layers - 1) * a_layer
            record[f"{mode}_{name}"] = of_one * (arms if mode == "in_turn" else 1)
        record[f"{name}_in_turn_over_batched"] = round(
            record[f"in_turn_{name}"] / record[f"batched_{name}"], 3
        )
    return record


def costs(config, quantized, arms: int | None, tokens, mesh, platform) -> dict[str, float]:
    """The compiler's costs of one step of one arm, or of `arms` in a batch."""

    loss = training.next_token_loss(config, unroll=config.num_layers, chunk=tokens)
    base = at_size.abstract_base(config, quantized)
    [state] = jax.eval_shape(partial(at_size.states_of, arms=1), base)
    batch = jax.eval_shape(lambda: at_size.batch(config, 1, tokens))
    step = training.train_step(loss, at_size.OPTIMIZER)
    if arms is not None:
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct((arms, *x.shape), x.dtype), state)
        step = jax.vmap(step, in_axes=(0, None, None))
    replicated = jax.NamedSharding(mesh, jax.P())
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), (state, base, batch)
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(step, donate_argnums=0).trace(*placed)
        return traced.lower(lowering_platforms=(platform,)).compile().cost_analysis()


def target(chip: str) -> tuple[jax.sharding.Mesh, str]:
    """One device of a machine that need not be present, and its platform."""
    if chip == "cpu":
        return jax.sharding.Mesh(jax.devices("cpu")[:1], ("device",)), "cpu"
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:2x2")
    return jax.sharding.Mesh(topology.devices[:1], ("device",)), "tpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--arms", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of each arm's row")
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--base", choices=("bfloat16", "nf4"), default="bfloat16")
    parser.add_argument("--compile-for", choices=("v5e", "v6e", "cpu"))
    parser.add_argument("--output", type=Path, help="also write the result here, as JSON")
    args = parser.parse_args()
    if args.shape == "tiny" and args.output:
        sys.exit("bench_sweep: times of --shape=tiny mean nothing and are not written.")
    given = (SHAPES[args.shape], args.base == "nf4", args.arms, args.tokens)
    if args.compile_for:
        record = counted(*given, args.compile_for)
    else:
        record = {"device": jax.devices()[0].device_kind, **measure(*given, args.blocks)}
    result = {
        "setting": f"{args.shape}, base in {args.base}, {args.arms} arms of LoRA r={at_size.RANK} "
        f"all-linear, 1 x {args.tokens} tokens an arm and step",
        "command": "python " + " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "versions": at_size.versions(),
        **record,
    }
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
