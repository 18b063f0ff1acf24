"""Times the kernels beside their peers, on one accelerator and in one run.

    pip install -r requirements.txt "jax[cuda13]" && python scripts/bench_kernels.py

Llama-3-8B's matrices in bfloat16, forward (`x @ W`) and backward (`dy @ W.T`). The peers of the NF4
matmul are a bfloat16 matmul, XLA's dequantise + dot, and bitsandbytes (in a process of its own)
where torch finds the GPU; those of grouped LoRA are in `bench_grouped_lora.py`. `--kernels` picks.
Every answer is checked against float64 first. Then blocks of calls alternate between the sides, so
that a slower clock slows all of them, and the median block counts. One call follows the other on
the device, each with another copy of the weight, and the copies together are 4 times the last-level
cache. Beside each time is the fraction of a limit: the time that memory or arithmetic need at the
least, whichever is longer, over the time that it took.

`--limits=H100` prints those least times, which are derived and not measured, and ends.
`--shapes=tiny` runs on any machine, to try the script; its times mean nothing and are not written.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_bitsandbytes import BLOCK, ask, peer_process

sys.path.insert(0, str(Path(__file__).parents[1]))
RESULTS = Path(__file__).parent / "results"

Shapes = dict[str, tuple]
Limit = tuple[float, float, int]
TINY: Shapes = {"rows": (1, 8), "matrices": ((256, 512),)}
LLAMA3_8B: Shapes = {
    "rows": (1, 4, 8, 16, 32, 64, 128, 512, 2048, 8192),
    "matrices": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
}
# Bytes a second, bfloat16 operations a second, bytes of last-level cache: the vendors' figures.
LIMITS = {
    "H100": (3.35e12, 989e12, 50 * 2**20),
    "H200": (4.8e12, 989e12, 50 * 2**20),
    "TPU v5 lite": (0.82e12, 197e12, 128 * 2**20),
    "TPU v5": (2.77e12, 459e12, 128 * 2**20),
    "TPU v6 lite": (1.64e12, 918e12, 128 * 2**20),
}
PACKED = {"kernel": True, "xla": True, "bfloat16": False, "bitsandbytes": True}


def floor(rows: int, K: int, N: int, *, packed: bool, limit: Limit) -> float:
    """Seconds that a product needs at the least: all bytes once, or all operations."""
    weight = K * N * (1 / 2 + 4 / BLOCK) if packed else 2 * K * N
    bandwidth, operations, _ = limit
    return max((weight + 2 * rows * (K + N)) / bandwidth, 2 * rows * K * N / operations)


def arguments(rows: int, K: int, N: int, backward: bool, copies: int) -> tuple[Any, list[Any]]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, N if backward else K), np.float32)
    codes = rng.integers(0, 256, (K // 2, N), np.uint8)
    absmax = rng.uniform(0.01, 0.1, (K // BLOCK, N)).astype(np.float32)
    return x, [(np.roll(codes, i, 1), np.roll(absmax, i, 1)) for i in range(copies)]


def jax_sides(implementation: str) -> dict[str, Callable]:
    """Name to `f(x, weight, backward)`."""
    import jax
    import jax.numpy as jnp

    from lora_jax.kernels.nf4_matmul import nf4_matmul

    def packed(name):
        def f(x, weight, backward):
            matmul = partial(nf4_matmul, implementation=name)
            if not backward:
                return matmul(x, *weight)
            like = jnp.zeros((len(x), 2 * len(weight[0])), x.dtype)
            return jax.vjp(lambda y: matmul(y, *weight), like)[1](x)[0]

        return f

    def dense(x, weight, backward):
        return x @ (weight.T if backward else weight)

    return {"kernel": packed(implementation), "xla": packed("xla"), "bfloat16": dense}


def prepare(side: str, f: Callable, rows: int, K: int, N: int, backward: bool, copies: int):
    """Puts arguments on the device, checks the answer, and returns a block of calls."""
    import jax
    import jax.numpy as jnp

    from lora_jax.kernels.nf4_matmul import reference

    x, weights = arguments(rows, K, N, backward, copies)
    x = jnp.asarray(x, jnp.bfloat16)
    weights = [tuple(map(jnp.asarray, weight)) for weight in weights]
    dense = jax.jit(partial(reference.dequantize, dtype=x.dtype))
    exact = np.asarray(dense(*weights[0])).astype(np.float64)
    if not PACKED[side]:
        weights = [dense(*weight) for weight in weights]

    @jax.jit
    def calls(x, weights):
        ys = []
        for weight in weights:
            ys.append(f(x, weight, backward))
            x, ys[-1] = jax.lax.optimization_barrier((x, ys[-1]))  # one after the other
        return ys

    y = np.asarray(calls(x, weights)[0][:8]).astype(np.float64)
    check(side, y, np.asarray(x[:8]).astype(np.float64), exact.T if backward else exact)

    def block() -> float:
        start = time.perf_counter()
        jax.block_until_ready(calls(x, weights))
        return (time.perf_counter() - start) / copies

    return block


def check(side: str, y: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    """Checks that bfloat16 answers are within a rounding of weights and a last rounding."""
    bound = 2.0**-7 * np.sqrt(np.square(x) @ np.square(w)) + 2.0**-7 * np.abs(x @ w)
    worst = (np.abs(y - x @ w) / bound).max()
    if not worst <= 1:
        sys.exit(f"bench_kernels: {side} is wrong: {worst:.1f} times the bound.")


def alternate(sides: dict[str, Callable], blocks: int) -> dict[str, float]:
    """The median seconds of each side's blocks, which alternate."""
    taken = [{side: block() for side, block in sides.items()} for _ in range(blocks)]
    return {side: statistics.median(block[side] for block in taken) for side in sides}


def measure(shapes: Shapes, limit: Limit | None, implementation: str, blocks: int):
    """A record for each shape, direction and number of rows."""
    peer, records = peer_process(), []
    for K, N in shapes["matrices"]:
        copies = max(2, -(-4 * limit[2] // (K * N // 2))) if limit else 2
        for backward in (False, True):
            for rows in shapes["rows"]:
                setting = [rows, K, N, backward, copies]
                sides = {
                    side: prepare(side, f, *setting)
                    for side, f in jax_sides(implementation).items()
                }
                if peer is not None:
                    sides["bitsandbytes"] = partial(ask, peer, setting)
                record = {"rows": rows, "d_in": K, "d_out": N, "backward": backward}
                for side, seconds in alternate(sides, blocks).items():
                    record[f"{side}_us"] = round(1e6 * seconds, 2)
                    if limit:
                        least = floor(rows, K, N, packed=PACKED[side], limit=limit)
                        record[f"{side}_of_limit"] = round(least / seconds, 3)
                records.append(record)
                print(json.dumps(record), flush=True)
    if peer is not None:
        peer.communicate()
    return records


def versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "libtpu", "torch", "bitsandbytes")
    here = [name for name in names if importlib.util.find_spec(name)]
    return {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in here}


def table(result: dict) -> str:
    """The records in Markdown."""
    columns = list(result["records"][0])
    lines = [
        f"{result['kernel']}: {result['device']}, {result['date']}; "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    rows = ([str(record[column]) for column in columns] for record in result["records"])
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def least_times(kind: str) -> str:
    """The least time of a product in bfloat16 and in NF4 on a device, and their ratio."""
    lines = ["| d_in x d_out | rows | bfloat16, us | NF4, us | ratio |", "|---|---|---|---|---|"]
    for K, N in LLAMA3_8B["matrices"]:
        for rows in LLAMA3_8B["rows"]:
            dense, packed = (
                1e6 * floor(rows, K, N, packed=packed, limit=LIMITS[kind])
                for packed in (False, True)
            )
            times = f"{dense:.1f} | {packed:.1f} | {dense / packed:.2f}"
            lines.append(f"| {K} x {N} | {rows} | {times} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", choices=("llama3-8b", "tiny"), default="llama3-8b")
    kernels = ("nf4_matmul", "grouped_lora")
    parser.add_argument("--kernels", choices=kernels, nargs="+", default=kernels)
    parser.add_argument("--blocks", type=int, default=15, help="blocks of calls a side")
    parser.add_argument("--output", type=Path, help="folder for the record and the table")
    parser.add_argument("--limits", choices=LIMITS, help="print the least times of a device")
    args = parser.parse_args()
    if args.limits:
        return print(least_times(args.limits))
    import jax

    device = jax.devices()[0]
    limit = next((found for kind, found in LIMITS.items() if kind in device.device_kind), None)
    tiny = args.shapes == "tiny"
    if limit is None and not tiny:
        sys.exit(
            f"bench_kernels: this is a {device.device_kind}; the kernels and their limits are for "
            f"{', '.join(LIMITS)}. --shapes=tiny tries the script anywhere."
        )
    if tiny and args.output:
        sys.exit("bench_kernels: times of --shapes=tiny mean nothing and are not written.")
    for kernel in args.kernels:
        result = run(kernel, device, limit, tiny, args.blocks)
        print(table(result))
        if args.output:
            write(result, args.output)


def run(kernel: str, device: Any, limit: Limit | None, tiny: bool, blocks: int) -> dict:
    """The record of one kernel."""
    import bench_grouped_lora as grouped

    shapes, bench = {
        "nf4_matmul": (TINY if tiny else LLAMA3_8B, measure),
        "grouped_lora": (grouped.TINY if tiny else grouped.LLAMA3_8B, grouped.measure),
    }[kernel]
    implementation = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}.get(device.platform, "xla")
    return {
        "device": device.device_kind,
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "command": "python " + " ".join(sys.argv),
        "kernel": f"{kernel}, {implementation}",
        "records": bench(shapes, limit, implementation, blocks),
    }


def write(result: dict, folder: Path) -> None:
    name = f"{result['kernel'].split(',')[0]}_{result['device']}".lower().replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"bench_kernels_{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / f"bench_kernels_{name}.md").write_text(table(result))


if __name__ == "__main__":
    main()
