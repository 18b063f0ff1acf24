"""Times many adapters over one base: our engine beside transformers with PEFT, on this machine.

    pip install -r requirements-parity.txt && python scripts/bench_serving.py
    python scripts/bench_serving.py --rank=16 --targets=all-linear

The base is SmolLM2-135M in float32, the adapters random LoRA, each request another one. Both sides
answer the same prompts with the same number of tokens, greedily, reading the prompts included;
PEFT's side is one `generate` of a padded batch with `adapter_names`. What is compared alternates in
blocks, so that a slower machine slows both, and the medians count.

Beside it: 32 requests of distinct adapters against 32 of the base alone; requests over a pool of
2,000 adapters against a pool of 5; the time that an adapter takes to come into the bank; one stream
of the base by `generate`, by the engine and by transformers.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout, installed or not

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax import serving
from lora_jax.interop import Pretrained, load, peft, save_huggingface
from lora_jax.models.generate import generate

MANY, FEW, POOLED = 2000, 5, 64  # adapters in the pools, and requests over them
SLOTS = 32


def adapters_of(model: Pretrained, count: int, rank: int, targets: Any) -> list[Any]:
    """Random adapters, whose every factor counts."""
    _, delta = lora.lora_transform(
        model.params, lora.LoRA(rank=rank, alpha=2 * rank), targets=targets, key=jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    leaves, treedef = jax.tree.flatten(delta)

    def drawn(leaf):
        if leaf.ndim < 3:
            return leaf
        return rng.standard_normal(leaf.shape, np.float32) * 0.02

    return [jax.tree.unflatten(treedef, [drawn(leaf) for leaf in leaves]) for _ in range(count)]


def engine_of(model: Pretrained, deltas: Mapping[str, Any], rows: int, args: Any) -> serving.Engine:
    """An engine for rows of one length, warmed up."""
    pool = None
    if deltas:
        widest = -(-args.rank // 8)
        bank = serving.make_bank(
            model.params, pages=SLOTS * widest, slots=SLOTS, targets=args.targets, widest=args.rank
        )
        pool = serving.Pool(model.params, bank)
        for name, delta in deltas.items():
            pool.add(name, delta)
    length = args.prompt + args.tokens
    pages = rows * -(-length // 16)
    engine = serving.Engine(
        model, pool, rows=rows, pages=pages, chunk=args.prompt, readers=rows, max_length=length
    )
    engine.warm_up()
    return engine


def run_engine(engine: serving.Engine, prompts: np.ndarray, names: list[Any], tokens: int) -> None:
    for prompt, name in zip(prompts, names, strict=True):
        engine.submit(
            serving.Request(
                tokens=tuple(map(int, prompt)),
                adapter=name,
                max_new_tokens=tokens,
                ignore_eos=True,
            )
        )
    count = 0
    while not engine.idle:
        count += sum(len(event.tokens) for event in engine.step())
    assert count == len(prompts) * tokens, count


def peft_side(model: Pretrained, deltas: Mapping[str, Any]) -> Callable:
    """`(prompts, names, tokens)`: transformers with all adapters loaded."""
    import torch
    import transformers
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        save_huggingface(f"{folder}/base", model)
        base = transformers.AutoModelForCausalLM.from_pretrained(
            f"{folder}/base", dtype=torch.float32
        ).eval()
        names, theirs = peft.model_names(model.config), None
        for name, delta in deltas.items():
            peft.save_adapter(f"{folder}/{name}", delta, model.params, names)
            if theirs is None:
                theirs = PeftModel.from_pretrained(base, f"{folder}/{name}", adapter_name=name)
            else:
                theirs.load_adapter(f"{folder}/{name}", adapter_name=name)

    def run(prompts: np.ndarray, names: list[Any], tokens: int) -> None:
        ids = torch.from_numpy(prompts)
        how: dict[str, Any] = {
            "attention_mask": torch.ones_like(ids),
            "min_new_tokens": tokens,
            "max_new_tokens": tokens,
            "do_sample": False,
            "pad_token_id": 0,
        }
        with torch.no_grad():
            if set(names) == {None}:
                with theirs.disable_adapter():
                    answers = theirs.generate(input_ids=ids, **how)
            else:
                answers = theirs.generate(input_ids=ids, adapter_names=names, **how)
        assert answers.shape == (len(prompts), prompts.shape[1] + tokens)

    return run


def alternated(sides: Mapping[str, Callable[[], None]], blocks: int) -> dict[str, list[float]]:
    """Seconds of each block of each side, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for _ in range(blocks):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def rates(seconds: Mapping[str, list[float]], tokens: int) -> dict[str, Any]:
    """Median tokens a second of each side, and the median of the first over each other one's."""
    found = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    first, *others = seconds
    ratios = {
        f"{first}/{other}": statistics.median(
            b / a for a, b in zip(seconds[first], seconds[other], strict=True)
        )
        for other in others
    }
    return {"tokens_per_second": _rounded(found), "ratios": _rounded(ratios)}


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}


def beside_peft(model, deltas, prompts, args) -> dict[str, Any]:
    theirs, found = peft_side(model, deltas), {}
    names = list(deltas)
    for count in args.concurrent:
        engine = engine_of(model, deltas, count, args)

        def one(run, *of, count=count):
            return lambda: run(*of, prompts[:count], names[:count], args.tokens)

        sides = {"ours": one(run_engine, engine), "peft": one(theirs)}
        found[count] = rates(alternated(sides, args.blocks), count * args.tokens)
        print(f"{count} requests of distinct adapters: {found[count]}", flush=True)
    return found


def beside_the_base(model, deltas, prompts, args) -> dict[str, Any]:
    count = max(args.concurrent)
    ours, base = engine_of(model, deltas, count, args), engine_of(model, {}, count, args)
    names = [*deltas][:count]
    sides = {
        "adapters": lambda: run_engine(ours, prompts[:count], names, args.tokens),
        "base": lambda: run_engine(base, prompts[:count], [None] * count, args.tokens),
    }
    found = rates(alternated(sides, args.blocks), count * args.tokens)
    print(f"{count} distinct adapters beside the base alone: {found}", flush=True)
    return found


def pools(model, prompts, args) -> dict[str, Any]:
    made = adapters_of(model, FEW, args.rank, args.targets)
    many = {f"a{i}": made[i % FEW] for i in range(MANY)}
    rng = np.random.default_rng(1)
    engines = {
        "many": engine_of(model, many, 8, args),
        "few": engine_of(model, dict([*many.items()][:FEW]), 8, args),
    }
    sides: dict[str, Callable[[], None]] = {}
    for name, size in (("many", MANY), ("few", FEW)):

        def side(name=name, size=size):
            names = [f"a{i}" for i in rng.integers(0, size, POOLED)]
            chosen = prompts[np.arange(POOLED) % len(prompts)]
            run_engine(engines[name], chosen, names, args.tokens)

        sides[name] = side
    found = rates(alternated(sides, args.blocks), POOLED * args.tokens)
    print(f"a pool of {MANY} beside one of {FEW}: {found}", flush=True)
    return found


def swaps(model, deltas, args) -> dict[str, float]:
    bank = serving.make_bank(
        model.params, pages=4 * -(-args.rank // 8), slots=4, targets=args.targets, widest=args.rank
    )
    pool = serving.Pool(model.params, bank)
    for name, delta in deltas.items():
        pool.add(name, delta)
    times = []
    for name in [*deltas, *deltas]:
        started = time.perf_counter()
        lease = pool.acquire(name)
        jax.block_until_ready(pool.bank)
        times.append(time.perf_counter() - started)
        pool.release(lease)
    found = {"median_ms": 1e3 * statistics.median(times), "least_ms": 1e3 * min(times)}
    print(f"an adapter comes into the bank in {_rounded(found)}", flush=True)
    return _rounded(found)


def one_stream(model, deltas, prompts, args) -> dict[str, Any]:
    theirs, engine = peft_side(model, dict([*deltas.items()][:1])), engine_of(model, {}, 1, args)
    whole = jax.jit(
        lambda params, ids, lengths: generate(
            params, ids, lengths, model.config, max_new_tokens=args.tokens, eos_id=-1
        )
    )
    ids, lengths = jnp.asarray(prompts[:1]), jnp.array([args.prompt])
    sides = {
        "engine": lambda: run_engine(engine, prompts[:1], [None], args.tokens),
        "transformers": lambda: theirs(prompts[:1], [None], args.tokens),
        "generate": lambda: jax.block_until_ready(whole(model.params, ids, lengths)),
    }
    found = rates(alternated(sides, args.blocks), args.tokens)
    print(f"one stream of the base: {found}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="q_proj|v_proj", help="or all-linear")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--parts", nargs="+", default=["peft", "base", "pools", "swaps", "stream"])
    parser.add_argument("--output", type=Path, help="also write the result here, as JSON")
    args = parser.parse_args()
    model = load()
    made = adapters_of(model, max(args.concurrent), args.rank, args.targets)
    deltas = {f"a{i}": delta for i, delta in enumerate(made)}
    shape = (max(args.concurrent), args.prompt)
    prompts = np.random.default_rng(2).integers(100, model.config.vocab_size, shape)
    parts: dict[str, Callable[[], Any]] = {
        "peft": lambda: beside_peft(model, deltas, prompts, args),
        "base": lambda: beside_the_base(model, deltas, prompts, args),
        "pools": lambda: pools(model, prompts, args),
        "swaps": lambda: swaps(model, deltas, args),
        "stream": lambda: one_stream(model, deltas, prompts, args),
    }
    names = ("jax", "jaxlib", "torch", "transformers", "peft")
    record = {
        "command": " ".join(["python", *sys.argv]),
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in names},
        **{name: parts[name]() for name in args.parts},
    }
    if args.output:
        args.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
