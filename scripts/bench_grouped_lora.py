"""What `bench_kernels.py` times of `grouped_lora`: tokens in segments of one adapter each.

The peers are XLA's implementation and the product with the base, `x @ W`, beside which adapters
run. Successive calls use other pages of one bank, as successive layers do. Answers are checked
against float64 first: at the first and last tokens of segments, and at the tokens behind them.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from bench_kernels import Limit, Shapes, alternate, check

RANKS = 8  # of a page
TINY: Shapes = {"batches": ((3, 3), (40, 3)), "matrices": ((64, 128),), "pages": (2,)}
LLAMA3_8B: Shapes = {
    # Tokens and segments: decoding, and training or prefilling with segments of any length.
    "batches": ((8, 8), (32, 32), (128, 128), (2048, 8), (8192, 32)),
    "matrices": ((4096, 4096), (4096, 14336)),
    "pages": (2, 8),  # of an adapter: ranks 16 and 64
}


def floor(N: int, S: int, D: int, O: int, w: int, limit: Limit) -> float:  # noqa: E741
    """Seconds that the product needs at the least: all bytes once, or all operations."""
    bandwidth, operations, _ = limit
    ranks = w * RANKS
    return max(2 * (S * ranks + N) * (D + O) / bandwidth, 2 * N * ranks * (D + O) / operations)


def arguments(N: int, S: int, D: int, O: int, w: int, limit: Limit | None) -> tuple:  # noqa: E741
    """`x, dy, W, a, b`, the pages of each call, and sizes.

    The pages of a block of calls are more than the last-level cache holds. Where segments are long,
    1 % of the tokens are behind them.
    """
    import jax
    import jax.numpy as jnp

    of_a_call = 2 * S * w * RANKS * (D + O)
    calls = max(4, -(-5 * limit[2] // (4 * of_a_call))) if limit else 2
    P = calls * S * w
    keys = iter(jax.random.split(jax.random.key(0), 5))
    x, dy, base, a, b = (
        (jax.random.normal(next(keys), shape, jnp.bfloat16) * scale).astype(jnp.bfloat16)
        for shape, scale in (
            ((N, D), 1),
            ((N, O), 1),
            ((D, O), D**-0.5),
            ((P, RANKS, D), D**-0.5),
            ((P, RANKS, O), O**-0.5),
        )
    )
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, S, N - N // 100 - S)
    sizes = np.ones(S, np.int32) + np.bincount(lengths, minlength=S).astype(np.int32)
    pages = rng.permutation(P).astype(np.int32).reshape(calls, S, w)
    return (
        x,
        dy,
        base,
        a,
        b,
        jnp.asarray(pages),
        jnp.asarray(sizes if N > S else np.ones_like(sizes)),
    )


def jax_sides(implementation: str) -> dict[str, Callable]:
    """Name to `f(x, dy, W, a, b, pages, sizes, backward)`."""
    import jax

    from lora_jax.kernels.grouped_lora import grouped_lora

    def grouped(name, x, dy, base, a, b, pages, sizes, backward):
        def f(x):
            return grouped_lora(x, a, b, pages, sizes, implementation=name)

        return jax.vjp(f, x)[1](dy)[0] if backward else f(x)

    def dense(x, dy, base, a, b, pages, sizes, backward):
        return dy @ base.T if backward else x @ base

    return {
        "kernel": partial(grouped, implementation),
        "xla": partial(grouped, "xla"),
        "base": dense,
    }


def prepare(side: str, f: Callable, given: tuple, backward: bool) -> Callable:
    """Checks the answer, and returns a block of calls."""
    import jax

    @jax.jit
    def calls(x, dy, base, a, b, pages, sizes):
        ys = []
        for of_a_call in pages:
            ys.append(f(x, dy, base, a, b, of_a_call, sizes, backward))
            x, dy, ys[-1] = jax.lax.optimization_barrier((x, dy, ys[-1]))  # one after the other
        return ys

    x, dy, _, a, b, pages, sizes = given
    y = calls(*given)[0]
    if side != "base":
        tokens, *factors = (dy, b, a) if backward else (x, a, b)
        check_tokens(side, y, tokens, *factors, pages[0], sizes)

    def block() -> float:
        start = time.perf_counter()
        jax.block_until_ready(calls(*given))
        return (time.perf_counter() - start) / len(pages)

    return block


def check_tokens(side: str, y: Any, x: Any, a: Any, b: Any, pages: Any, sizes: Any) -> None:
    """Checks tokens at the ends of at most 8 segments, and that those behind the last are zero."""
    sizes = np.asarray(sizes)
    ends = np.cumsum(sizes)
    if np.asarray(y[ends[-1] :]).astype(np.float32).any():
        raise SystemExit(f"bench_kernels: {side} is wrong: tokens without pages are not zero.")
    for s in range(0, len(sizes), -(-len(sizes) // 8)):
        a_s, b_s = (np.concatenate(np.asarray(factor[pages[s]])) for factor in (a, b))
        rows = np.array([ends[s] - sizes[s], ends[s] - 1])
        found, tokens, a_s, b_s = (
            np.asarray(array).astype(np.float64) for array in (y[rows], x[rows], a_s, b_s)
        )
        check(side, found, tokens @ a_s.T, b_s)


def measure(shapes: Shapes, limit: Limit | None, implementation: str, blocks: int) -> list[dict]:
    """A record for each matrix, number of ranks, direction and batch."""
    settings = [
        (*batch, *matrix, w, backward)
        for matrix in shapes["matrices"]
        for w in shapes["pages"]
        for backward in (False, True)
        for batch in shapes["batches"]
    ]
    records = []
    for *setting, backward in settings:
        given = arguments(*setting, limit)
        medians = alternate(
            {
                side: prepare(side, f, given, backward)
                for side, f in jax_sides(implementation).items()
            },
            blocks,
        )
        N, S, D, O, w = setting  # noqa: E741
        record = {"tokens": N, "segments": S, "d_in": D, "d_out": O, "ranks": w * RANKS}
        record |= {"backward": backward}
        record |= {f"{side}_us": round(1e6 * seconds, 2) for side, seconds in medians.items()}
        for side in ("kernel", "xla") if limit else ():
            record[f"{side}_of_limit"] = round(floor(*setting, limit) / medians[side], 3)
        records.append(record)
        print(json.dumps(record), flush=True)
    return records
